"""The most that this device can do, measured in the run that is judged by it: one large product, one large copy.

A kernel that reads and writes each byte once can at best be as fast as a copy. `python -m benchmarks.ceilings` prints
both.
"""

import functools
from collections.abc import Callable, Sequence

import torch

from benchmarks.harness.command import Parser
from benchmarks.harness.timing import Stopwatch
from soflow_fast.training.precision import matmul_precision, resolve_device

SIDE = {"cuda": 8192, "cpu": 2048}
"""Side of the square matrices that are multiplied."""
BYTES = {"cuda": 2**30, "cpu": 2**28}
"""Size of the buffer that is copied: above ten times the last cache of a GPU, and above most of a CPU's."""
REPEATS = {"cuda": 30, "cpu": 5}
DTYPES = {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
"""The operands' dtype by a step's precision; fp8 is held to bf16, in which everything but its blocks is."""


@functools.cache
def product_ceiling(device: torch.device, precision: str) -> float:
    """FLOP/s of the fastest of several large products in a step's precision."""
    n = SIDE[device.type]
    dtype = DTYPES[precision]
    # Noise, not constants: a GPU at its power limit multiplies those faster than any training's numbers.
    a, b, out = (torch.randn(n, n, device=device).to(dtype) for _ in range(3))
    with matmul_precision("tf32" if precision == "tf32" else "fp32", device):  # the precision of float32 operands
        return 2 * n**3 / min(_seconds(lambda: torch.mm(a, b, out=out), Stopwatch(device), REPEATS[device.type]))


@functools.cache
def copy_ceiling(device: torch.device) -> float:
    """Bytes/s, read and written, of the fastest of several large copies."""
    row = copy(device, REPEATS[device.type])
    return row["bytes"] / min(row["seconds"])


def copy(device: torch.device, rounds: int = 20, size: int | None = None) -> dict:
    """A row: the bytes that a copy of `size` bytes (None: BYTES of the device) moves, read and written, and the seconds
    of each round."""
    size = BYTES[device.type] if size is None else size
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    seconds = _seconds(lambda: target.copy_(source), Stopwatch(device, cold=True), rounds)
    return {"operation": "copy", "pass": "copy", "way": "torch.Tensor.copy_", "bytes": 2 * size, "seconds": seconds}


def _seconds(call: Callable[[], object], stopwatch: Stopwatch, rounds: int) -> list[float]:
    return [stopwatch.seconds(call) for _ in range(2 + rounds)][2:]  # the first two warm up


def main(argv: Sequence[str] | None = None) -> None:
    """The command, which takes no arguments."""
    Parser(prog="python -m benchmarks.ceilings", description=__doc__).parse(argv)
    device = resolve_device("auto")
    for precision in ("fp32", "bf16") if device.type == "cpu" else ("fp32", "tf32", "bf16"):
        print(f"{precision} product: {product_ceiling(device, precision) / 1e12:.4g} TFLOP/s")
    print(f"copy: {copy_ceiling(device) / 1e9:.4g} GB/s, read and written")
