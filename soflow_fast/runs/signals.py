"""The signals that end a run: which they are, which have come, and how a training collects them until it has saved.

A process begins with `watch`, under which the first signal acts wherever the program is. A training step is not to be
cut short, so the trainer holds signals back with `collected` and looks at them between steps.
"""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
NOTHING_TO_SAVE = "stopped before the first step; the same command begins where this one did"

LEAVE = 20
"""Seconds after a SIGTERM until a process that serves another one ends."""

ECHO = 5.0
"""Seconds within which a signal is sent again by whoever forwards it."""

_received: list[int] = []
_came: dict[int, float] = {}
_echoes = False


def handled() -> list[signal.Signals]:
    """The signals that end a run: not SIGHUP where it is ignored, as by nohup."""
    return [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]


def received() -> list[int]:
    """The signals that came under `watch`. An exception that a handler raised is lost where Python cannot raise, as in
    a destructor or in a callback of C code; its signal is still known here."""
    return list(_received)


def forget() -> None:
    """Forget the signals that came before: a new command begins in this process."""
    global _echoes
    _received.clear()
    _came.clear()
    _echoes = False


def expect_echoes(come: bool = True) -> None:
    """From now on a signal that comes again within seconds counts once: torchrun and srun forward to their processes
    what a terminal or Slurm has sent to those as well. come: False: no longer."""
    global _echoes
    _echoes = come


def _is_echo(signum: int) -> bool:
    now = time.monotonic()
    first = _came.setdefault(signum, now)
    return _echoes and 0 < now - first < ECHO


def ignore() -> None:
    """From now on no signal does anything: how this process ends is settled."""
    if threading.current_thread() is threading.main_thread():
        for number in handled():
            signal.signal(number, signal.SIG_IGN)


def watch(act: Callable[[int], None]) -> None:
    """From now on note each signal and call `act` with its number.

    A SIGHUP that follows another signal is ignored: a terminal that goes away sends several, and systemd sends one
    beside its SIGTERM.
    """

    def handle(signum: int, frame: object) -> None:
        if (signum == signal.SIGHUP and _received) or _is_echo(signum):
            return
        _received.append(signum)
        act(signum)

    for number in handled():
        signal.signal(number, handle)


def serve(parent: int) -> None:
    """In a process that works for another one, its parent: signals are for that one, and it does not outlive it.

    Slurm, systemd and `timeout` send SIGTERM to the processes of a run all alike. The parent then ends its step and
    saves, for which it may need this one, so that one stays for LEAVE seconds; a pool that has lost one of its
    processes ends the others that way too, and cannot wait for ever.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(LEAVE))
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went before
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def collected(idle: Callable[[], bool] = lambda: False) -> Iterator[list[int]]:
    """Collect the signals that come inside in the list that is yielded, beginning with those already received.

    A second signal raises Interrupted at once. So does the first one while `idle()` holds, that is before the first
    step: nothing is to be saved then, and the step may compile for minutes. An error that a compiler made of that
    exception is raised as Interrupted again. SIGHUP never counts as the second signal. Outside of the main thread
    Python lets nobody set a handler, and nothing is collected.
    """
    pending = received()

    def handle(signum: int, frame: object) -> None:
        if _is_echo(signum):
            return
        if signum != signal.SIGHUP and any(number != signal.SIGHUP for number in pending):
            raise Interrupted(signum, "stopped at once by a second signal; the last checkpoint stands", at_once=True)
        pending.append(signum)
        if idle() and len(pending) == 1:
            raise Interrupted(signum, NOTHING_TO_SAVE)

    here = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handle) for number in (handled() if here else ())}
    try:
        if pending and idle():  # the exception of one that came before was lost
            raise Interrupted(pending[0], NOTHING_TO_SAVE)
        yield pending
    except Exception:
        if pending and idle():
            raise Interrupted(pending[0], NOTHING_TO_SAVE) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
