#!/bin/sh
# Runs the tests in lanes: sh tests/run.sh fast|all [pytest's arguments]
#
#   fast  everything but what is marked `slow`: minutes on two cores
#   all   everything
#
# Two processes run at the same time, with one thread each: the engine's tests, and beside them the kernels' and then those
# of the benchmarks, data and configurations, which makes the two equally long. Triton decides once in a process, when it is imported, whether it compiles or interprets; the kernels are
# interpreted where there is no GPU, the engine needs them as they are. The engine's tests write to the terminal; the
# others write to a file each, which are printed when they are done. All closing lines come last.
#
# Arguments that name a file, folder or test (tests/test_flow.py::test_x) run just that, slow or not, in one process.
# Options alone (-x, -k NAME) go to both processes.
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

# The engine's tests stay in the foreground: a shell starts what it sends to the background with SIGINT ignored, and they
# are about SIGINT. A process in the background that is told to end takes its pytest along.
(
    trap 'test -z "$running" || kill "$running" 2>/dev/null; exit 143' TERM
    for part in kernels rest; do
        case $part in
        kernels) folders=tests/kernels ;;
        rest) folders='tests/benchmarks tests/data tests/config' ;;
        esac
        # shellcheck disable=SC2086 # several folders
        "$PYTHON" -m pytest "--color=$color" -m "$selection" "$@" $folders >"$folder/$part" 2>&1 &
        running=$!
        wait "$running"
        echo $? >"$folder/$part.code"
    done
) &
beside=$!
# -u: the dots appear as the tests end. The exit code goes through a file, since a pipe's is that of `tee`.
{
    "$PYTHON" -u -m pytest "--color=$color" -m "$selection" "$@" \
        tests --ignore=tests/kernels --ignore=tests/benchmarks --ignore=tests/data --ignore=tests/config
    echo $? >"$folder/engine.code"
} 2>&1 | tee "$folder/engine"

echo "The tests of the kernels, then those of the benchmarks, data and configurations:"
wait "$beside"
beside=
cat "$folder/kernels" "$folder/rest"

# Exit code 5 is pytest's for "no tests". Options such as -k may leave some of the parts with none, never all of them.
failed=0
ran=no
for part in engine kernels rest; do
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
