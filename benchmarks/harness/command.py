"""The parts that all commands share: arguments that are checked, and processes that end with the command."""

import argparse
import difflib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import NoReturn

from soflow_fast.commands import process
from soflow_fast.errors import UserError

MOST = 10**9
MOST_SECONDS = 1e7
"""A third of a year. More than these is a mistake of typing."""


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call `main` and exit as the engine's commands do: a mistake is one line and exit code 2, a signal has its own."""

    def to_the_end() -> None:
        if code := main():
            sys.exit(code)

    process.run(to_the_end)


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors are UserError, and which knows the nearest flag to an unknown one."""

    def __init__(self, *, prog: str, description: str | None) -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, allow_abbrev=False, formatter_class=form)

    def parse(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse; an unknown flag raises UserError with the nearest known one."""
        values, unknown = self.parse_known_args(arguments)
        if unknown:
            name = unknown[0].split("=")[0]
            known = [flag for action in self._actions for flag in action.option_strings]
            close = difflib.get_close_matches(name, known, 1, 0.5)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise UserError(f"unknown {'flag' if name.startswith('-') else 'argument'} {name}{hint}")
        return values

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def count(text: str) -> int:
    """A whole number from 1 on."""
    return _whole(text, 1, MOST)


def seed(text: str) -> int:
    """A seed of a random generator."""
    return _whole(text, 0, 2**63 - 1)


def seconds(text: str) -> float:
    """A duration; 0 is the shortest that there is."""
    return _real(text, lambda value: 0 <= value <= MOST_SECONDS, f"must be from 0 to {MOST_SECONDS:g} seconds")


def fraction(text: str) -> float:
    """Above 0, at most 1."""
    return _real(text, lambda value: 0 < value <= 1, "must be above 0 and at most 1")


def worker_count(text: str) -> int:
    """Processes at a time: as many as the machine has cores at most, as each of them keeps one busy."""
    value, cores = count(text), os.cpu_count() or 1
    if value > cores:
        raise argparse.ArgumentTypeError(f"must be at most {cores}, the cores of this machine, got {text}")
    return value


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add `--workers`, for `workers`: one per core where it is not given."""
    about = "runs at a time, one thread each (one per core, which is also the most)"
    parser.add_argument("--workers", type=worker_count, default=os.cpu_count() or 1, metavar="N", help=about)


def _whole(text: str, least: int, most: int) -> int:
    if not text.strip().lstrip("+-").isdecimal() or len(text) > 40:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}")
    value = int(text)
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"must be from {least} to {most}, got {text}")
    return value


def _real(text: str, allowed: Callable[[float], bool], wanted: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
    if not allowed(value):  # also when it is NaN
        raise argparse.ArgumentTypeError(f"{wanted}, got {text}")
    return value


def distinct(name: str, values: list) -> None:
    """Raises UserError if something is given twice: it would count twice."""
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise UserError(f"{name}: {twice} is given twice")


@contextmanager
def workers(number: int) -> Iterator[ProcessPoolExecutor]:
    """So many fresh processes. However the block ends, they end with it; an interrupted one does not wait for them."""
    context = multiprocessing.get_context("spawn")
    # Ctrl-C reaches every process of a terminal: the first one alone answers it.
    pool = ProcessPoolExecutor(number, context, signal.signal, (signal.SIGINT, signal.SIG_IGN))
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    pool.shutdown()
