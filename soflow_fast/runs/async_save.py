"""Checkpoints written in a thread, from a copy taken at the step, while training goes on."""

import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import torch.distributed as dist

from ..training.state import TrainState
from . import checkpoint

if TYPE_CHECKING:
    from ..training.parallel import Parallel
    from .checkpoint.sharded import Parts

PATIENCE = 1.0
"""Seconds that an abandoned save has to clean up; the next start removes the rest."""
WRITING = timedelta(days=1)
"""How much longer than another rank's the writing of a rank may take. One that hangs is found by `ranks.watch`."""


class _Abandoned(BaseException):
    """Ends a save that nobody waits for any more."""


class Saver:
    """Writes one checkpoint at a time: the next one waits for the one before it.

    A crash costs at most one interval and the steps made during a write, under two intervals in all: the loop waits for
    the write to end before it makes the step that is saved next. A save that the disk refused adds its interval.

    As a context manager: a block that ends well or by an Exception waits for the save under way; one that is
    interrupted abandons it.

    Each rank of a run makes one at the same time, and calls it at the same steps. They write a checkpoint together: it
    is there or refused for all of them. Their threads talk in a process group of their own, whose messages cannot be
    taken for those of the steps that go on meanwhile.

    Args:
        run_dir: the run directory.
        keep: how many of the newest checkpoints stay.
        warn: is told, in the thread that calls, of a save that the disk refused and of what `before` reports.
        before: is called in the writing thread before each save, with a function that takes warnings.
        parallel: the ranks of the run; None: this process alone.
    """

    def __init__(
        self,
        run_dir: Path,
        keep: int,
        warn: Callable[[str], None],
        before: Callable[[Callable[[str], None]], None] = lambda warn: None,
        parallel: "Parallel | None" = None,
    ) -> None:
        self.run_dir, self.keep, self.warn, self.before = run_dir, keep, warn, before
        # Not the thread's own `join`: interrupted once, it takes the thread for stopped (CPython 3.11).
        self._idle = threading.Event()
        self._idle.set()
        self._thread: threading.Thread | None = None
        self._failed: tuple[int, BaseException] | None = None
        self._warnings: list[str] = []
        self._abandoned = False
        self._group: Any = None if parallel is None else dist.new_group(backend="gloo", timeout=WRITING)

    def begin(self, state: TrainState) -> None:
        """Wait for the save under way, copy `state` and begin to write it."""
        self.wait()
        content = checkpoint.snapshot(state)
        thread = threading.Thread(target=self._write, args=(content,), name="checkpoint", daemon=True)
        self._idle.clear()
        try:
            thread.start()
        except BaseException:
            self._idle.set()
            raise
        self._thread = thread

    def finish(self, state: TrainState) -> None:
        """Save `state` before this returns. Raises OSError if that failed."""
        self.begin(state)
        failed = self._join()
        if failed:
            raise failed[1]

    def poll(self) -> None:
        """Tell of a save that has failed meanwhile."""
        if self._failed or self._warnings:
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being written. Raises the error of a save if it was no fault of the disk's."""
        failed = self._join()
        if failed and not isinstance(failed[1], OSError):
            raise failed[1]
        if failed:
            self.warn(f"checkpoint of step {failed[0]} not saved: {failed[1]}")

    def _join(self) -> tuple[int, BaseException] | None:
        self._idle.wait()
        if self._thread:  # it still frees its tensors: Python, if it ended now, would end it in the midst of that, and
            self._thread.join()  # C++ would abort the process
            self._thread = None
        failed, self._failed = self._failed, None
        warnings, self._warnings = self._warnings, []
        for text in warnings:
            self.warn(text)
        return failed

    def _write(self, content: "checkpoint.Snapshot | Parts") -> None:
        begun = False

        def proceed() -> None:
            nonlocal begun
            if not begun:  # as a part of the save, whose errors all ranks learn of
                begun = True
                self.before(self._warnings.append)
            if self._abandoned:
                raise _Abandoned

        try:
            checkpoint.write(self.run_dir, content, self.keep, proceed, self._warnings.append, self._group)
        except _Abandoned:
            pass
        except BaseException as error:  # raised again in the thread that waits for this one
            self._failed = content.step, error
        finally:
            self._idle.set()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        if kind is None or issubclass(kind, Exception):
            self.wait()
        else:
            self._abandoned = True
            self._idle.wait(PATIENCE)
        return False
