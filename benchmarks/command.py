"""What the commands share: arguments that are checked, and processes that end with the command.

A mistake is one line and exit code 2, by `soflow_fast.commands.process.run`; so is a signal, with its own code.
"""

import argparse
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

from soflow_fast.errors import UserError

MOST = 10**9
MOST_SECONDS = 1e7
"""A third of a year. More than these is a mistake of typing."""


def count(text: str) -> int:
    """A whole number from 1 on."""
    return _whole(text, 1, MOST)


def seed(text: str) -> int:
    """What a random generator takes."""
    return _whole(text, 0, 2**63 - 1)


def seconds(text: str) -> float:
    """A duration; 0 is the shortest that there is."""
    return _real(text, lambda value: 0 <= value <= MOST_SECONDS, f"must be from 0 to {MOST_SECONDS:g} seconds")


def fraction(text: str) -> float:
    """Above 0, at most 1."""
    return _real(text, lambda value: 0 < value <= 1, "must be above 0 and at most 1")


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


def no_command(module: str, instead: str) -> None:
    """For a module that is no command: raises UserError saying what to type."""
    raise UserError(f"{module} is no command: {instead}")
