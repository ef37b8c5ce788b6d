"""`python -m benchmarks.gpu --minutes 10`: everything that the owner of a GPU can contribute within so many minutes.

In the order of worth: environment, the kernels' tests compiled, the step at XL/2 and B/2, operations, the engine's
tests that need a GPU, sampling, sweeps. Each is a process with a share of the time that is left; the plan of minutes is
printed first. One that fails or runs out of time is named at the end and does not stop the others; what it has measured
by then is on record, row by row, and what it has not is named too. The records are listed last: hand them in as they
are.
"""

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.report import record
from soflow_fast.errors import UserError

TRIAL = record.ROOT / "runs" / "benchmarks"
"""Where --allow-cpu leaves its records: they are none to hand in."""
WITHIN = "{within}"
GRACE = 15.0
"""Seconds between asking a process to end, which then writes its record, and ending it."""
ALL = 60.0
"""Minutes from which on every recipe is timed, and each alone at its largest batch; below, those of
contestants.HEADLINE."""


class Part(NamedTuple):
    """One thing to do. A share is relative to the shares of the parts that follow."""

    name: str
    share: float
    """Of ten minutes, in seconds."""
    command: list[str]
    """A word may have WITHIN in it: the seconds after which the part should begin nothing more."""


def parts(minutes: float, cpu: bool = False) -> list[Part]:
    """The parts, most worth first; times inside them follow the minutes. cpu: the small things only."""
    scale = minutes / 10
    python, pytest = [sys.executable, "-m"], [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    bounded = [*pytest, "-p", "benchmarks.harness.within", f"--within={WITHIN}"]
    tests = bounded + beside_each_other(os.cpu_count() or 1)
    step = [*python, "benchmarks.step", f"--seconds={12 * scale:g}", f"--within={WITHIN}"]
    step += ["--only=digits"] if cpu else ["--every"] * (minutes >= ALL)
    kernels = "tests/kernels/test_math.py" if cpu else "tests/kernels"
    engine = [
        "tests/kernels/test_engine.py",
        "tests/training",
        "tests/models",
        "tests/sampling/test_one_step.py",
        "-m",
        "gpu",
    ]
    largest = [*pytest, "benchmarks/test_step.py", "--record", "-k", "test_largest_batch"]
    operations = [*bounded, "benchmarks/test_kernels.py", "--record", f"--kernel-seconds={0.3 * scale:g}"]
    return [
        Part("environment", 15, [*python, "soflow_fast.train", "--env"]),
        Part("kernels' tests", 75, [*tests, "--taking=device", kernels]),
        Part("the step", 350, step),
        Part("operations", 80, operations),
        Part("engine's tests", 25, [*tests, *engine]),
        Part("sampling", 25, [*python, "benchmarks.sampling", f"--seconds={3 * scale:g}", f"--within={WITHIN}"]),
        Part("sweeps", 30, [*python, "benchmarks.sweeps", f"--seconds={2 * scale:g}", f"--within={WITHIN}"]),
        *([Part("the largest batches", 600, largest)] if minutes >= ALL and not cpu else []),
    ]


def beside_each_other(processors: int) -> list[str]:
    """Arguments by which tests run in several processes, where pytest-xdist and enough processors are there: compiling
    kernels takes most of their time, on the host."""
    if importlib.util.find_spec("xdist") is None or processors < 8:
        return []
    return ["-n", str(min(processors - 2, 12)), "-p", "no:benchmark"]


def run(part: Part, seconds: float, environment: dict[str, str]) -> str | None:
    """Run a part with its output shown, for at most so many seconds; None, or in words how it failed."""
    try:
        # What is begun within four fifths of the time is likely to end within it; what is not is on record by then.
        command = [word.replace(WITHIN, f"{0.8 * seconds:.0f}") for word in part.command]
        process = subprocess.Popen(command, cwd=record.ROOT, env=environment, start_new_session=True)
    except OSError as error:
        return f"could not be started: {error.strerror}"
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        _end(process)
        return f"ran out of time after {seconds:.0f} s"
    except BaseException:  # Ctrl-C and SIGTERM reach us alone: the part has a session of its own
        _end(process)
        raise
    return None if code == 0 else f"exit code {code}"


def _end(process: subprocess.Popen) -> None:
    """End a process and all that it started."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, signum)
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            pass
        break


def run_all(todo: Sequence[Part], seconds: float, records: Path) -> int:
    """Run the parts within so many seconds, and say what came of them. Returns how many failed."""
    ours = [str(record.ROOT), str(record.ROOT / "kernels")]
    path = os.pathsep.join([*ours, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "SOFLOW_RECORDS": str(records)}
    before, ends, failed = _written(records), time.monotonic() + seconds, []
    print(f"== plan of {seconds / 60:g} minutes, in seconds (time that one leaves is for those after it):")
    for part in todo:
        print(f"   {part.name}: {seconds * part.share / sum(other.share for other in todo):.0f}", flush=True)
    try:
        for index, part in enumerate(todo):
            left = ends - time.monotonic()
            share = left * part.share / sum(other.share for other in todo[index:])
            print(f"== {part.name}, at most {max(share, 0):.0f} s", flush=True)
            failure = run(part, share, environment) if share > 0 else "no time was left"
            if failure is not None:
                failed.append(f"{part.name}: {failure}")
                print(f"== {failed[-1]}", flush=True)
    except KeyboardInterrupt:
        failed.append("stopped before its end")
    print("== done" if not failed else "== not done:")
    for line in failed:
        print(f"   {line}")
    found = [path for path, written in _written(records).items() if before.get(path) != written]
    missing = [name for path in found for name in _missing(path)]
    print("== left out:" if missing else "== nothing that a record asks for is left out")
    for line in missing:
        print(f"   {line}")
    print("== records:" if found else "== no records")
    for path in found:
        print(f"   {record.shown(path)}")
    return len(failed)


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """SIGTERM and SIGINT, ignored or not until now as in a shell's background, raise KeyboardInterrupt inside."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _missing(path: Path) -> list[str]:
    """What a record lacks."""
    try:
        run = record.read(path)
    except UserError:
        return [f"{record.shown(path)} cannot be read"]
    return [f"{run['benchmark']}: {name}" for name in run.get("missing", ())]


def _written(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in sorted(folder.glob("*.json"))}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 1 if a part failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything together (10)")
    parser.add_argument("--allow-cpu", action="store_true", help="without a GPU, try it all small; nothing to hand in")
    arguments = parser.parse_args(argv)
    if not 0 < arguments.minutes < float("inf"):
        parser.error(f"--minutes must be above 0 and finite, got {arguments.minutes:g}")
    cpu = not torch.cuda.is_available()
    if cpu and not arguments.allow_cpu:
        print("benchmarks.gpu: no GPU here (--allow-cpu tries it all small)", file=sys.stderr)
        return 2
    records = TRIAL if cpu else record.RECORDS
    with stopped_by_signals():
        return min(run_all(parts(arguments.minutes, cpu), 60 * arguments.minutes, records), 1)
