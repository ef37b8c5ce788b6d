#!/bin/sh
# Runs the tests in lanes: sh tests/run.sh fast|all [pytest's arguments]
#
#   fast  everything but what is marked `slow`: minutes on two cores
#   all   everything
#
# Two processes run at the same time, with one thread each. Triton decides once in a process, when it is imported, whether
# it compiles or interprets; the kernels are interpreted where there is no GPU, the engine needs them as they are. The
# engine's tests write to the terminal; the kernels' write to a file, which is printed when they are done. The closing
# lines of both come last.
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
kernels=
trap 'test -z "$kernels" || kill "$kernels" 2>/dev/null; rm -rf "$folder"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# The kernels' tests are the ones in the background: a shell starts what it sends there with SIGINT ignored, and the
# engine's tests are about SIGINT.
"$PYTHON" -m pytest "--color=$color" -m "$selection" "$@" tests/kernels >"$folder/kernels" 2>&1 &
kernels=$!
# -u: the dots appear as the tests end. The exit code goes through a file, since a pipe's is that of `tee`.
{
    "$PYTHON" -u -m pytest "--color=$color" -m "$selection" "$@" tests --ignore=tests/kernels
    echo $? >"$folder/code"
} 2>&1 | tee "$folder/engine"
engine_code=$(cat "$folder/code")

echo "The kernels' tests, in a process of their own:"
wait "$kernels"
kernels_code=$?
kernels=
cat "$folder/kernels"

printf 'Engine:  '
tail -n 1 "$folder/engine"
printf 'Kernels: '
tail -n 1 "$folder/kernels"

# Exit code 5 is pytest's for "no tests". Options such as -k may leave one of the two with none, never both.
if [ $# -gt 0 ]; then
    if [ "$engine_code" = 5 ] && [ "$kernels_code" = 0 ]; then engine_code=0; fi
    if [ "$kernels_code" = 5 ] && [ "$engine_code" = 0 ]; then kernels_code=0; fi
fi
[ "$engine_code" = 0 ] || exit "$engine_code"
exit "$kernels_code"
