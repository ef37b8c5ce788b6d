"""The one timer: calls are timed in turn, round after round, so that whatever else the machine does hits all alike."""

import gc
import time
from collections.abc import Callable

import torch

CACHES = 2**28
"""Bytes of the buffer whose writing pushes everything else out of a GPU's caches."""


class Stopwatch:
    """Seconds of one call, to its end on the device.

    cold: a GPU's own events time the call, behind a write that empties its caches, as suits a short kernel, above all
    where it is `recorded`. A CPU has neither.
    """

    def __init__(self, device: torch.device, *, cold: bool = False) -> None:
        self.device = device
        self._buffer = torch.empty(CACHES, dtype=torch.uint8, device=device) if cold and device.type == "cuda" else None

    def seconds(self, call: Callable[[], object]) -> float:
        """Calls it, waits until it is done, and returns how long it took."""
        if self._buffer is None:
            synchronize(self.device)
            began = time.perf_counter()
            call()
            synchronize(self.device)
            return time.perf_counter() - began
        # The write keeps the GPU busy while the host goes ahead, so that a short kernel does not wait for its launch.
        self._buffer.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        synchronize(self.device)
        return begin.elapsed_time(end) / 1e3


def recorded(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The launches of a warm call as a CUDA graph: the function that runs them all by one launch of the host.

    Events around a call of several short kernels would time the host between them. Whatever a recording refuses, such
    as a copy from pageable memory, is raised.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    with torch.cuda.device(device):
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream(device).wait_stream(stream)
        with torch.cuda.graph(graph):
            kept = call()
    held = [kept]  # results and graph live as long as what runs them

    def replay() -> object:
        graph.replay()
        return held

    return replay


class InTurn:
    """Several calls by name, timed in turn. Each round begins with another, so that none always follows the same."""

    def __init__(self, device: torch.device, *, cold: bool = False) -> None:
        self.calls: dict[str, Callable[[], object]] = {}
        self.seconds: dict[str, list[float]] = {}
        """Every timed call, in order; sample i of each name is of round i."""
        self._stopwatch = Stopwatch(device, cold=cold)
        self._rounds = 0

    def add(self, name: str, call: Callable[[], object], seconds: list[float] | None = None) -> None:
        """Let a call take part. seconds: the list that its samples go to, such as that of a record's row."""
        self.calls[name] = call
        self.seconds[name] = [] if seconds is None else seconds

    def clear(self) -> None:
        """Let nobody take part any more; lists that were given keep their samples."""
        self.calls.clear()
        self.seconds.clear()

    def once(self, name: str) -> None:
        """Time one call."""
        self.seconds[name].append(self._stopwatch.seconds(self.calls[name]))

    def round(self, *, but: str | None = None) -> None:
        """Time every call once, except one that is timed by others."""
        for name in self._order(but):
            self.once(name)

    def rounds_within(self, seconds: float, *, least: int, most: int, trials: int = 1) -> int:
        """How many rounds fit into about so many seconds, judged by the last of some rounds that do not count."""
        for _ in range(trials):
            self.round()
        took = sum(samples[-1] for samples in self.seconds.values())
        for samples in self.seconds.values():
            samples.clear()
        return max(least, min(most, int(seconds / max(took, 1e-9))))

    def run(self, seconds: float, *, least: int, most: int, warm_up: int = 0) -> list[str]:
        """Rounds for about so many seconds, of which the first `warm_up` do not count.

        A call that runs out of memory drops out and loses its samples. Returns the names of those.
        """
        began, rounds, dropped = time.perf_counter(), 0, []
        while self.calls and (rounds < least or (rounds < most and time.perf_counter() - began < seconds)):
            for name in self._order():
                try:
                    self.once(name)
                except torch.OutOfMemoryError:
                    del self.calls[name]
                    self.seconds[name].clear()
                    dropped.append(name)
            rounds += 1
        for samples in self.seconds.values():
            del samples[:warm_up]
        return dropped

    def _order(self, but: str | None = None) -> list[str]:
        names = [name for name in self.calls if name != but]
        first = self._rounds % max(1, len(names))
        self._rounds += 1
        return names[first:] + names[:first]


def synchronize(device: torch.device) -> None:
    """Wait for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release() -> None:
    """Give back the memory that nobody holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
