"""What this device can do at most, measured in the run that is judged by it: one large product, one large copy.

`python -m benchmarks.ceilings` prints them.
"""

import functools
import time
from collections.abc import Callable, Sequence

import torch

from soflow_fast.commands import process
from soflow_fast.commands.parser import Parser
from soflow_fast.training.consistency_target import products
from soflow_fast.training.state import resolve_device

SIDE = {"cuda": 8192, "cpu": 2048}
"""Of the square matrices that are multiplied."""
BYTES = {"cuda": 2**30, "cpu": 2**28}
"""Of the tensor that is copied: many times the caches."""
REPEATS = {"cuda": 30, "cpu": 5}
DTYPES = {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
"""The operands' dtype by a step's precision; fp8 is held to bf16, in which all but its blocks is."""


@functools.cache
def product_ceiling(device: torch.device, precision: str) -> float:
    """FLOP/s of the fastest of several large products in a step's precision."""
    n = SIDE[device.type]
    dtype = DTYPES[precision]
    # Noise, not constants: a GPU at its power limit multiplies those faster than any training's numbers.
    a, b, out = (torch.randn(n, n, device=device).to(dtype) for _ in range(3))
    with products("tf32" if precision == "tf32" else "fp32", device):  # of float32 operands
        return 2 * n**3 / _fastest(lambda: torch.mm(a, b, out=out), device)


@functools.cache
def copy_ceiling(device: torch.device) -> float:
    """Bytes/s, read and written, of the fastest of several large copies."""
    source, target = (torch.ones(BYTES[device.type], dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source), device)


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(2 + REPEATS[device.type]):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times[2:])


def synchronize(device: torch.device) -> None:
    """Wait for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(argv: Sequence[str] | None = None) -> None:
    """The command, which takes no arguments."""
    Parser(prog="python -m benchmarks.ceilings", description=__doc__).parse(argv)
    device = resolve_device("auto")
    for precision in ("fp32", "bf16") if device.type == "cpu" else ("fp32", "tf32", "bf16"):
        print(f"{precision} product: {product_ceiling(device, precision) / 1e12:.4g} TFLOP/s")
    print(f"copy: {copy_ceiling(device) / 1e9:.4g} GB/s, read and written")


if __name__ == "__main__":
    process.run(main)
