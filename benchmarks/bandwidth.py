"""How fast this device's memory copies: what the traffic of a kernel is held against.

A kernel that reads and writes each byte once can at best be as fast as a copy. The bytes are far more than any cache
holds; a copy of n bytes moves 2 n.
"""

import time
from collections.abc import Callable

import torch

from benchmarks.race import synchronize

BYTES = {"cuda": 2**30, "cpu": 2**27}
"""Of the buffer that is copied: above ten times the last cache of a GPU, and above most of a CPU's."""
FLUSH = 2**28
"""Of the buffer that pushes everything else out of a GPU's caches."""


class Stopwatch:
    """Seconds of one call. On a GPU its own events time it, behind a write that empties the caches."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flushed = torch.empty(FLUSH, dtype=torch.uint8, device=device) if device.type == "cuda" else None

    def seconds(self, call: Callable[[], object]) -> float:
        """Calls it, waits until it is done, and returns what it took."""
        if self._flushed is None:
            began = time.perf_counter()
            call()
            return time.perf_counter() - began
        # The write keeps the GPU busy while the host goes ahead, so that a short kernel does not wait for its launch.
        self._flushed.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        synchronize(self.device)
        return begin.elapsed_time(end) / 1e3


def copy(device: torch.device, rounds: int = 20, size: int | None = None) -> dict:
    """A row: the bytes that a copy of `size` bytes (None: BYTES of the device) moves, and the seconds of each round."""
    size = BYTES[device.type] if size is None else size
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    watch = Stopwatch(device)
    seconds = [watch.seconds(lambda: target.copy_(source)) for _ in range(2 + rounds)]
    return {"operation": "copy", "pass": "copy", "way": "torch.Tensor.copy_", "bytes": 2 * size, "seconds": seconds[2:]}
