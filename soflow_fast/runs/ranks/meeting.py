"""The ranks of a run come together at torch's Store. One that fails before leaves word there, for those that wait."""

import math
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from ...launch import Launch
from .failure import Failure, from_json
from .judge import Limits

MET = "met"


class Ended(Exception):
    """The run has ended before all ranks had met. `line`: what this rank prints; `code`: of all processes."""

    def __init__(self, line: str, code: int) -> None:
        super().__init__(line or "another rank has failed")
        self.line, self.code = line, code


class Meeting:
    """What one rank does until all are there.

    Args:
        launch: its place.
        limits: how long it waits for what.
        tell: prints a line on stderr; None: there is none to print on.
    """

    def __init__(self, launch: Launch, limits: Limits, tell: Callable[[str], None] | None = None) -> None:
        self.store: Any = None
        """The Store that all ranks see; None: it is not reached yet."""
        self.limits = limits
        self._launch, self._tell = launch, tell
        self._of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._keeps_store = launch.rank == 0 and not self._of_torchrun
        self._place = f"{launch.address}:{launch.port}"
        self._words: Any = None
        self._came = False

    def meet(self) -> Any:
        """The Store, once all ranks have come. Waits for minutes, and says so after half a minute.

        Raises Ended where they cannot meet, and where one has failed meanwhile.
        """
        launch, began = self._launch, time.monotonic()
        self._open(math.inf)  # patience has an end of its own
        try:
            if self._words.add(f"came/{launch.rank}", 1) > 1 and not self._of_torchrun:
                self._words = None  # which are another run's
                raise self._nowhere(f"MASTER_PORT {launch.port}", "another run does")
            self._words.add("came", 1)
            self._came = True
            while not (outcome := self._outcome()):
                if launch.rank == 0 and self._words.add("came", 0) >= launch.world:
                    self._words.compare_set("outcome", "", MET)
                self._wait(began, self._missing)
        except RuntimeError as error:  # as torch's of stores and networks are
            raise self._lost(error) from None
        if outcome != MET:
            self._words.add("told", 1)
            raise Ended("", from_json(outcome).code)
        self.store.set_timeout(timedelta(seconds=self.limits.patience))
        return self.store

    def leave_word(self, failure: Failure) -> str | None:
        """Tell the others of a failure of this rank. Returns the line that it prints; None: all have met meanwhile.

        It waits for seconds until those that are to come can know. Nobody may be there who could.
        """
        until = time.monotonic() + 2 * self.limits.silence
        try:
            self._open(until)
        except Ended:
            return failure.line()
        try:
            mine = failure.to_json()
            first = self._words.compare_set("outcome", "", mine).decode()
            if first == MET:
                return None
            self._words.add(failure.alike(), 1)
            self._words.add("failed", 1)  # after what is read once all have failed
            self._words.add("told", 1)
            return failure.line(failure.kind == "error" and self._all_alike(failure, until)) if first == mine else ""
        except RuntimeError:  # rank 0 has gone
            return failure.line()

    def linger(self) -> None:
        """Keep the store, if it is this rank's, until the others know the outcome, those too that come in the next
        seconds."""
        if not self._keeps_store or self._words is None:
            return
        until = time.monotonic() + 2 * self.limits.silence
        while self._words.add("told", 0) < self._launch.world and time.monotonic() < until:
            time.sleep(self.limits.period / 10)

    def _all_alike(self, failure: Failure, until: float) -> bool:
        """Whether all ranks fail with the same text. One that has come to the meeting does not."""
        while (failed := self._words.add("failed", 0)) < self._launch.world:
            if self._words.add("came", 0) > int(self._came) or time.monotonic() > until:
                return False
            time.sleep(self.limits.period / 10)
        return self._words.add(failure.alike(), 0) == failed

    def _outcome(self) -> str:
        return self._words.get("outcome").decode() if self._words.check(["outcome"]) else ""

    def _missing(self) -> list[int]:
        return [rank for rank in range(self._launch.world) if not self._words.check([f"came/{rank}"])]

    def _open(self, until: float) -> None:
        """Reach the store, which rank 0 or torchrun keeps. Raises Ended where it cannot be, and after `until`."""
        began = time.monotonic()
        patience = 1.5 * self.limits.silence
        while self._words is None:
            try:
                listens = self._listens()
            except socket.gaierror as error:
                if time.monotonic() > min(until, began + patience):
                    raise self._nowhere(f"MASTER_ADDR {self._launch.address}", str(error.strerror)) from None
                listens = False
            if listens:
                self._connect(min(patience, max(1.0, until - time.monotonic())))
            elif time.monotonic() > until:
                raise Ended("", 1)
            else:
                self._wait(began, lambda: [0])

    def _listens(self) -> bool:
        """Whether a store may be reached. Raises socket.gaierror of an address that is none."""
        if self._keeps_store:
            socket.getaddrinfo(self._launch.address, self._launch.port)
            return True
        try:
            socket.create_connection((self._launch.address, self._launch.port), timeout=5).close()
        except socket.gaierror:
            raise
        except OSError:  # nobody is there yet
            return False
        return True

    def _connect(self, patience: float) -> None:
        """Set `store`. A signal ends the wait: the main thread would not hear it in torch's code, so another one waits
        there. Raises Ended."""
        from torch.distributed import PrefixStore, TCPStore

        launch, found = self._launch, list[Any]()

        def connect() -> None:
            try:
                store = TCPStore(
                    *(launch.address, launch.port, launch.world, self._keeps_store),
                    timeout=timedelta(seconds=patience),
                    wait_for_workers=False,
                    multi_tenant=True,
                )
                store.add("open", 1)
                found.append(store)
            except Exception as error:  # for the thread that waits
                found.append(error)

        waiting = threading.Thread(target=connect, daemon=True)
        waiting.start()
        waiting.join(patience + 1)
        reason: Any = found[0] if found else "no answer"
        if isinstance(reason, Exception) and not isinstance(reason, (RuntimeError, ValueError)):
            raise reason  # no error of torch's about networks and stores
        if not found or isinstance(reason, Exception):
            text = (str(reason).strip().splitlines() or [""])[0]
            raise self._nowhere(f"MASTER_PORT {launch.port}", text)
        # torchrun may keep one store over all its attempts.
        self.store = PrefixStore("attempt-" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), reason)
        self._words = PrefixStore("meeting", self.store)

    def _nowhere(self, what: str, reason: str) -> Ended:
        """Of what is the same on all ranks of a machine, whose first one says it."""
        speaks = self._launch.rank == 0 or self._launch.local_rank == 0
        return Ended(f"error: {what}: {self._launch.world} ranks cannot meet there: {reason}" if speaks else "", 2)

    def _wait(self, began: float, missing: Callable[[], list[int]]) -> None:
        """A moment. Says once who is missing, and raises Ended when patience is at its end."""
        waited, speaks = time.monotonic() - began, self._launch.rank == 0 or (not self._came and self._speaks())
        if waited > self.limits.patience:
            line = f"error: {_ranks(missing())} did not come to {self._place} within {self.limits.patience:.0f} s"
            raise Ended(line if speaks else "", 2)
        if waited > 3 * self.limits.silence and self._tell and speaks:
            self._tell(f"waiting for {_ranks(missing())} at {self._place}")
            self._tell = None
        time.sleep(self.limits.period / 10)

    def _lost(self, error: RuntimeError) -> Ended:
        reason = (str(error).strip().splitlines() or [""])[0]
        who = "lost the store" if self._of_torchrun else "rank 0 died before all ranks had met"
        return Ended(f"error: {who} at {self._place}: {reason}" if self._speaks() else "", 1)

    def _speaks(self) -> bool:
        """Whether this rank says that rank 0 is missing, which nobody can ask then."""
        return self._launch.rank == 1 or self._launch.local_rank == 0


def _ranks(ranks: list[int]) -> str:
    """ "rank 1", "ranks 1, 3", and no more than some of many."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return "ranks " + ", ".join(str(rank) for rank in ranks[:8]) + (f" and {len(ranks) - 8} more" if ranks[8:] else "")
