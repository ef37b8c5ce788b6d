#!/bin/sh
# Runs the tests in lanes: sh tests/run.sh fast|all [pytest's arguments]
#
#   fast  everything but what is marked `slow`: minutes on two cores
#   all   everything
#
# The tests are cut into parts, each a pytest of its own: Triton decides once in a process, when it is imported, whether it
# compiles or interprets; the kernels are interpreted where there is no GPU, the engine needs them as they are. Two
# workers with one thread each take the next part that is left until there is none. What the one in the foreground runs
# is seen as it goes, the rest is printed when it is done. All closing lines come last.
#
# Arguments that name a file, folder or test (tests/test_flow.py::test_x) run just that, slow or not, in one process.
# Options alone (-x, -k NAME) go to all parts.
set -u
PYTHON=${PYTHON:-python3}
lane=${1:?fast or all}
shift
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

for argument; do
    if [ -e "${argument%%::*}" ]; then
        exec "$PYTHON" -m pytest "$@"
    fi
done

case $lane in
fast) selection='not slow' ;;
all) selection='slow or not slow' ;;
*)
    echo "tests/run.sh: the lanes are fast and all, not '$lane'" >&2
    exit 2
    ;;
esac
color=auto
[ -t 1 ] && color=yes # pytest writes to pipes and files here, and would take none

folder=$(mktemp -d "${TMPDIR:-/tmp}/soflow-tests.XXXXXX") || exit 1
beside=
trap 'test -z "$beside" || kill "$beside" 2>/dev/null; rm -rf "$folder"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Longest first.
parts='reliability kernels rest commands training benchmarks runs models'

# A shell starts what it sends to the background with SIGINT ignored, and some tests are about SIGINT.
start='import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])'

# next_part: the first part that nobody has taken, as `part`; false if there is none. A folder is made by one alone.
next_part() {
    for part in $parts; do
        mkdir "$folder/$part.taken" 2>/dev/null && return
    done
    return 1
}

paths_of() {
    if [ "$1" != rest ]; then
        echo "tests/$1"
        return
    fi
    echo tests
    for other in $parts; do
        [ "$other" = rest ] || echo "--ignore=tests/$other"
    done
}

# A worker in the background that is told to end takes its pytest along.
(
    trap 'test -z "$running" || kill "$running" 2>/dev/null; exit 143' TERM
    running=
    while next_part; do
        # shellcheck disable=SC2046 # several words
        "$PYTHON" -c "$start" "$PYTHON" -m pytest "--color=$color" -m "$selection" "$@" $(paths_of "$part") \
            >"$folder/$part" 2>&1 &
        running=$!
        wait "$running"
        echo $? >"$folder/$part.code"
    done
) &
beside=$!
while next_part; do
    # -u: the dots appear as the tests end. The exit code goes through a file, since a pipe's is that of `tee`.
    {
        # shellcheck disable=SC2046 # several words
        "$PYTHON" -u -m pytest "--color=$color" -m "$selection" "$@" $(paths_of "$part")
        echo $? >"$folder/$part.code"
    } 2>&1 | tee "$folder/$part"
    : >"$folder/$part.seen"
done

echo "What ran beside that:"
wait "$beside"
beside=
for part in $parts; do
    [ -e "$folder/$part.seen" ] || cat "$folder/$part"
done

# Exit code 5 is pytest's for "no tests". Options such as -k may leave some of the parts with none, never all of them.
failed=0
ran=no
for part in $parts; do
    printf '%-12s' "$part:"
    tail -n 1 "$folder/$part"
    code=$(cat "$folder/$part.code")
    case $code in
    0) ran=yes ;;
    5) if [ $# = 0 ]; then failed=5; fi ;;
    *) failed=$code ;;
    esac
done
if [ $failed = 0 ] && [ $ran = no ]; then failed=5; fi
exit "$failed"
