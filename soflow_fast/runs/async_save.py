"""Checkpoints written in a thread, from a copy taken at the step, while training goes on."""

import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Literal

from ..training.state import TrainState
from . import checkpoint

PATIENCE = 1.0
"""Seconds that an abandoned save has to clean up; what it leaves then, the next start removes."""


class _Abandoned(BaseException):
    """Ends a save that nobody waits for any more."""


class Saver:
    """One save at a time: the next one waits for the one before it. `warn` is told of a save that the disk refused.
    `before` is called in the thread, before each one.

    What a crash costs: the newest whole checkpoint is of the last interval but one while that of the last one is being
    written, so at most one interval and the steps made during the write; under two intervals in all, as the loop waits
    for the write before it makes the step that is saved next. A save that the disk refused adds its interval.

    As a context manager: a block that ends well or by an Exception waits for the save under way; one that is
    interrupted abandons it.
    """

    def __init__(
        self, run_dir: Path, keep: int, warn: Callable[[str], None], before: Callable[[], None] = lambda: None
    ) -> None:
        self.run_dir, self.keep, self.warn, self.before = run_dir, keep, warn, before
        # Not the thread's own `join`: interrupted once, it takes the thread for stopped (CPython 3.11).
        self._idle = threading.Event()
        self._idle.set()
        self._thread: threading.Thread | None = None
        self._failed: tuple[int, BaseException] | None = None
        self._warnings: list[str] = []
        self._abandoned = False

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
        """Tell of a save that has failed since."""
        if self._failed or self._warnings:
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written. Raises what was no fault of the disk's."""
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

    def _write(self, content: checkpoint.Snapshot) -> None:
        try:
            self.before()
            checkpoint.write(self.run_dir, content, self.keep, self._proceed, self._warnings.append)
        except _Abandoned:
            pass
        except BaseException as error:  # a thread's: raised again in the one that waits for it
            self._failed = content.step, error
        finally:
            self._idle.set()

    def _proceed(self) -> None:
        if self._abandoned:
            raise _Abandoned

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
