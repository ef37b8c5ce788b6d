"""`python -m benchmarks.host_time`: what the host does in a step before a GPU does anything, timed on a CPU.

The real step of a tiny network goes the ways of a GPU: our operations check, allocate and prepare their launches, which
are then dropped; torch's operations run on tensors so small that what takes their time is the way there. Networks of
two depths tell what a block costs. Which machine it is decides the figures; how many operations there are does not.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness import command
from soflow_fast.config.presets import preset
from soflow_fast.config.schema import override
from soflow_fast.training.state import TrainState
from soflow_fast.training.step import train_step
from soflow_kernels.testing import launches_dropped

TINY = {"model.hidden_size": 64, "model.num_heads": 4, "model.input_size": 8, "batch_size": 4}
DEPTHS = (12, 28)


class HostTime(NamedTuple):
    """A step of one depth."""

    depth: int
    milliseconds: list[float]
    ours: int
    """Calls of our operations."""
    others: int
    """Calls of torch's, views included."""


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found[func.namespace] += 1
        return func(*args, **(kwargs or {}))


def measure(depth: int, steps: int, clock: Callable[[], float]) -> HostTime:
    """Time `steps` steps of a network of a depth, after two that are not timed and one that is counted."""
    config = override(preset("imagenet256-b2", device="cpu", precision="bf16"), {**TINY, "model.depth": depth})
    config = override(config, {"run.check_quotient_every": 0, "run.on_nonfinite": "skip"})
    source = torch.Generator().manual_seed(0)
    images: Any = torch.randn(4, 4, 8, 8, generator=source), torch.arange(4)
    seconds = []
    with launches_dropped():
        state = TrainState.build(config)
        state.set_attention("sdpa-flash")  # one operation, as on a GPU
        for _ in range(2):
            train_step(state, *images)
        with _Calls() as calls:
            train_step(state, *images)
        for _ in range(steps):
            began = clock()
            train_step(state, *images)
            seconds.append(1e3 * (clock() - began))
    ours = calls.found.pop("soflow")
    return HostTime(depth, seconds, ours, calls.found.total())


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = command.Parser(prog="python -m benchmarks.host_time", description=__doc__)
    parser.add_argument("--steps", type=command.count, default=20, help="steps that are timed at each depth (20)")
    options = parser.parse(argv)
    torch.set_num_threads(1)
    found = [measure(depth, options.steps, time.perf_counter) for depth in DEPTHS]
    print("depth   ms a step (quartiles)        our operations   torch's")
    for row in found:
        low, middle, high = statistics.quantiles(row.milliseconds, n=4) if options.steps > 1 else 3 * row.milliseconds
        print(f"{row.depth:5d}   {middle:6.2f} ({low:.2f} to {high:.2f}){row.ours:21d}{row.others:10d}")
    a, b = found
    block = (statistics.median(b.milliseconds) - statistics.median(a.milliseconds)) / (b.depth - a.depth)
    print(f"a block: {block:.3f} ms, {(b.ours - a.ours) / (b.depth - a.depth):g} operations of ours, "
          f"{(b.others - a.others) / (b.depth - a.depth):g} of torch's")  # fmt: skip
