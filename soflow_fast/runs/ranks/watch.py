"""The ranks of a run watch over each other: one that fails, dies or hangs ends all, with one line on stderr.

A thread of each rank tells torch's Store every second that it lives and how far it is. Rank 0 reads what all say and
judges; the others look for a verdict, and judge rank 0. The first verdict stands, and whoever gives it prints it. The
thread ends the process itself, by the function that `ends_with` was given: the main thread may be in a collective that
never returns. A second thread ends it where the first one gets no answer from the store.
"""

import os
import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from ...errors import ConfigError
from ...launch import Launch
from .. import signals
from .failure import Failure, from_json, kind_of
from .judge import Beat, Judge, Limits
from .meeting import Ended, Meeting
from .place import place

End = Callable[[str, int, Callable[[], None]], NoReturn]
"""Prints a line on stderr, if it is not empty, calls a function, and ends the process with an exit code, from any
thread."""

_end: End | None = None
_tell: Callable[[str], None] | None = None
_watch: "Watch | None" = None
_meeting: Meeting | None = None


def ends_with(end: End | None, tell: Callable[[str], None] | None = None) -> None:
    """Let the process be ended by `end`, and print other lines on stderr by `tell`. A new command begins in this
    process, which nobody watches yet."""
    global _end, _tell, _watch, _meeting
    _end, _tell, _watch, _meeting = end, tell, None, None


def current() -> "Watch | None":
    """The watch of this process, once it has begun."""
    return _watch


@contextmanager
def watched(launch: Launch | None, hang_seconds: float = 0, limits: Limits | None = None) -> "Iterator[Watch]":
    """Meet the other ranks, and be watched inside, to leave together at the end. In one process nobody watches, and
    neither in a program of somebody else's, in which nothing may end the process.

    hang_seconds: without progress, beyond ten usual steps, after which a rank hangs; 0: never.
    The process is ended where they cannot meet or do not come, or one has failed before; where nothing may end it,
    that is a ConfigError.
    """
    global _watch, _meeting
    if launch is None:
        yield Watch()
        return
    if hang_seconds:
        # NCCL would end processes of its own when it loses another one, before there is a verdict.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    limits = limits or Limits()
    _meeting = Meeting(launch, limits, _tell)
    try:
        store = _meeting.meet()
    except Ended as ended:
        if _end is None:
            raise ConfigError(str(ended)) from None
        _end(ended.line, ended.code, _meeting.linger)
    watch = Watch(launch, store, hang_seconds, limits, _end)
    _watch = watch if _end else None
    yield watch
    watch.leave()


def failed_early(launch: Launch, error: BaseException, text: str, code: int, kept: str = "") -> NoReturn:
    """End all ranks, and this process, for an error of this one before they have met. text: one line; kept: the name
    of a file with its traceback."""
    assert _end is not None
    meeting = _meeting or Meeting(launch, Limits())
    line = meeting.leave_word(Failure(launch.rank, launch.host, text, code, kind_of(error), kept))
    if line is None:  # all have met meanwhile
        Watch(launch, meeting.store, 0, meeting.limits, _end).failed(error, text, code, kept)
    _end(line, code, meeting.linger)


class Watch:
    """What a rank says to the others, and what it hears. Without arguments: of a process that is alone."""

    def __init__(
        self,
        launch: Launch | None = None,
        store: Any = None,
        hang_seconds: float = 0,
        limits: Limits = Limits(),  # noqa: B008  # it is frozen
        end: End | None = None,
    ) -> None:
        self.store = store
        """What all ranks see, for `training.parallel.join`."""
        self.running = False
        self.step, self._phase, self._marks = 0, "start", 0
        self._begun: tuple[int, float] = (-2, 0.0)
        self._seconds: deque[float] = deque(maxlen=9)
        self._failure: Failure | None = None
        self._wake, self._done, self._over = threading.Event(), threading.Event(), threading.Event()
        self._leaves = self._counted = False
        self._ending, self._said = threading.Lock(), False
        if launch is None or end is None:
            return
        self._launch, self._limits, self._end = launch, limits, end
        self._of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        from torch.distributed import PrefixStore

        shared: Any = PrefixStore("watch", store)
        self._store: Any = shared.clone()  # a connection of its own: one that waits in a thread makes all others wait
        self._heard_ranks = range(launch.world) if launch.rank == 0 else range(1)
        self._judge = Judge(self._heard_ranks, limits, 0 if launch.rank else hang_seconds)
        self._keys = ["verdict", "final", *(f"beat/{rank}" for rank in self._heard_ranks)]
        self._clock, self._last, self._count, self._rounds, self._marked = 0.0, time.monotonic(), 0, 0, (0, 0.0)
        self._verdict, self._verdict_since, self._lost_since = b"", 0.0, 0.0
        self.running = True
        for work in (self._talk, self._guard):
            threading.Thread(target=work, name="soflow-watch", daemon=True).start()

    def mark(self, step: int, phase: str) -> None:
        """Say that the main thread is at step `step` now, and in which phase: "data" and "step" are brief, others may
        take minutes."""
        if phase == "step":
            now = time.monotonic()
            before, since = self._begun
            if step == before + 1:
                self._seconds.append(now - since)
            self._begun = (step, now)
        self.step, self._phase, self._marks = step, phase, self._marks + 1

    def at_work(self) -> None:
        """Say that this rank does not hang, as a part of what it is at is done."""
        self._marks += 1

    def leave(self) -> None:
        """Wait until every rank is done; then destroy the process group. Signals do nothing from then on.

        A rank that goes while others work would take its connections from them.
        """
        if not self.running:
            return
        self._leaves = True
        self._wake.set()
        self._done.wait()
        signals.ignore()
        self.running = False
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()

    def failed(self, error: BaseException, text: str, code: int, kept: str = "") -> NoReturn:
        """End all ranks, and this process, for an error of this one, unless another rank's was first. text: one line;
        empty: print nothing. kept: the name of a file with its traceback."""
        self._failure = Failure(self._launch.rank, self._launch.host, text, code, kind_of(error), kept)
        self._wake.set()
        self._over.wait(3 * self._limits.silence + self._limits.agreement)
        self._end_with(self._failure.line(), code)  # the thread is not there any more

    def _talk(self) -> None:
        try:
            self._open()
            while not self._round():
                self._wake.wait(self._limits.period)
                self._wake.clear()
        except RuntimeError as error:  # as torch's of stores and networks are
            self._without_store(str(error))
        self._over.set()
        self._done.set()

    def _open(self) -> None:
        """Begin with what everybody may read at any time without waiting for it."""
        if self._launch.rank == 0:
            keys = ["verdict", "final", *(f"beat/{rank}" for rank in self._heard_ranks)]
            self._store.multi_set(keys, [""] * len(keys))
            self._tick()  # so that the others know its machine from the first moment
            self._store.set("ready", "yes")
        else:
            self._store.wait(["ready"])
        self._rounds += 1

    def _round(self) -> bool:
        """Speak and listen once. Returns whether the run is over and well."""
        self._tick()
        self._verdict, final, *beats = self._store.multi_get(self._keys)
        if final:
            return self._follow(int(final))
        self._judge.hear(self._clock, dict(zip(self._heard_ranks, beats, strict=True)))
        failure = self._own_failure()
        if self._verdict:
            self._wait_for_its_end()
        elif failure or (failure := self._judge.failure(self._clock, self.step, self._is_lost())):
            self._claim(failure)
        elif self._launch.rank == 0 and self._judge.all_left():
            self._store.set("final", "0")
            return self._follow(0)
        return False

    def _tick(self) -> None:
        """Say that this rank lives. Time in which the process was stopped as a whole does not count."""
        now = time.monotonic()
        self._clock += min(now - self._last, 2 * self._limits.period)
        self._last = now
        if self._marked[0] != self._marks:
            self._marked = (self._marks, self._clock)
        self._count += 1
        self._rounds += 1
        where, waits = place() if self._clock - self._marked[1] > 2 * self._limits.period else ("", False)
        beat = Beat(
            *(self._count, self._launch.host, self.step, self._phase, self._marks),
            *(statistics.median(list(self._seconds) or [0.0]), where, waits, self._is_lost(), self._leaves),
            self._judge.spare(),
        )
        self._store.set(f"beat/{self._launch.rank}", beat.to_json())

    def _is_lost(self) -> bool:
        return self._failure is not None and self._failure.kind == "lost"

    def _own_failure(self) -> Failure | None:
        """The error of this rank, if it is to end all. One that only follows from another rank's end waits for that
        to be known."""
        failure = self._failure
        if failure and failure.kind == "error" and not self._counted:
            self._counted = True
            self._store.add(failure.alike(), 1)
            self._store.add("failed", 1)  # after what is read once all have failed
        if failure and failure.kind == "lost":
            self._lost_since = self._lost_since or self._clock
            return failure if self._clock - self._lost_since > 1.5 * self._limits.silence else None
        return failure

    def _claim(self, failure: Failure) -> None:
        """Make a failure the verdict, unless there is another; then tell it, and end all."""
        mine = failure.to_json()
        if self._store.compare_set("verdict", "", mine).decode() != mine:
            return
        self._verdict = mine.encode()
        common = failure.kind == "error" and self._all_failed_alike(failure)
        self._finish(failure, common)

    def _all_failed_alike(self, failure: Failure) -> bool:
        """Whether each rank comes with the same error while this one waits for it."""
        until = self._clock + self._limits.agreement
        while (failed := self._store.add("failed", 0)) < self._launch.world and self._clock < until:
            time.sleep(self._limits.period / 10)
            self._tick()
        return failed == self._launch.world and self._store.add(failure.alike(), 0) == failed

    def _finish(self, failure: Failure, common: bool = False) -> NoReturn:
        def told() -> None:
            self._store.set("final", str(failure.code))
            self._wait_for_others(len(self._judge.silent(self._clock)) if self._launch.rank == 0 else 0)

        self._end_with(failure.line(common), failure.code, told)

    def _wait_for_its_end(self) -> None:
        """Of a verdict whose rank still waits for others; one that died over it is told by another."""
        failure = from_json(self._verdict)
        self._verdict_since = self._verdict_since or self._clock
        late = self._clock - self._verdict_since - self._limits.agreement
        if late > self._limits.silence / 2 and self._launch.rank == (failure.rank == 0):
            self._finish(failure)
        if late > self._limits.silence:
            self._end_with("", failure.code)

    def _follow(self, code: int) -> bool:
        """End as the verdict says, the rank that keeps the store last."""
        if not self._leaves or code:
            if self._of_torchrun and code:
                time.sleep(self._limits.period)  # it takes the process that ends first for the cause
            self._end_with("", code, self._wait_for_others)
        self._wait_for_others()
        return True

    def _wait_for_others(self, dead: int = 0) -> None:
        """Until they have read how the run ends, if this rank keeps the store; the others say that they have."""
        if self._launch.rank or self._of_torchrun:
            self._store.add("read", 1)
            return
        until = self._clock + self._limits.silence
        while self._store.add("read", 0) < self._launch.world - 1 - dead and self._clock < until:
            time.sleep(self._limits.period / 20)
            self._tick()

    def _guard(self) -> None:
        """End the process where the store gives no answer: a machine that is gone closes no connection."""
        seen, quiet = -1, 0.0
        while not self._over.wait(self._limits.period):
            seen, quiet = self._rounds, quiet + self._limits.period if seen == self._rounds else 0.0
            if quiet > (1.5 if seen else 2) * self._limits.silence:
                self._without_store("no answer")

    def _without_store(self, reason: str) -> None:
        """End as the verdict says that is known, or for the loss of the store: with rank 0, or with its torchrun."""
        if self._verdict:
            failure = from_json(self._verdict)
            own = failure.rank == self._launch.rank
            self._end_with(failure.line() if own else "", failure.code)
        where = f"{self._launch.address}:{self._launch.port}"
        if self._of_torchrun or self._launch.rank == 0:
            reason = (reason.strip().splitlines() or [""])[0]
            mine = self._launch.rank, self._launch.host
            failure = Failure(*mine, f"lost the store at {where}: {reason}", 1, "judged")
        else:
            failure = self._judge.dead([0], self.step)
        self._end_with(failure.line() if self._speaks() else "", 1)

    def _speaks(self) -> bool:
        """Whether this rank tells that the store is lost: the first one of those that are there. Nobody can ask."""
        first = self._judge.beats.get(0)
        try:
            socket.create_connection((self._launch.address, self._launch.port), timeout=3).close()
        except ConnectionRefusedError:  # the machine is there
            pass
        except OSError:
            if first and first.spare:
                return self._launch.rank == first.spare
        return self._launch.rank == (0 if self._of_torchrun else 1)

    def _end_with(self, line: str, code: int, told: Callable[[], None] = lambda: None) -> NoReturn:
        """Print a line, unless another thread has printed one, tell the others and end."""
        with self._ending:
            said, self._said = self._said, True
        self._end("" if said else line, code, told)
