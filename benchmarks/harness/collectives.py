"""What ranks send each other: every collective, as torch's dispatcher sees it, and the bytes of its ring."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

RINGS = {
    "allreduce_": 2,
    "allreduce_coalesced_": 2,
    "_allgather_base_": 1,
    "allgather_": 1,
    "allgather_into_tensor_coalesced_": 1,
    "_reduce_scatter_base_": 1,
    "reduce_scatter_": 1,
    "reduce_scatter_tensor_coalesced_": 1,
    "broadcast_": 1,
}
"""How often a ring of N ranks sends (N - 1) / N of a collective's bytes from each of them. In a broadcast all but the
last rank send all of it, which is that in the mean."""
SILENT = ("barrier", "monitored_barrier_")


class Collective(NamedTuple):
    """One call."""

    name: str
    size: int
    """Bytes that each rank has before or after it, whichever are more."""
    ranks: int

    @property
    def sent(self) -> float:
        """Bytes that each rank sends in a ring, and receives as many."""
        return ring(RINGS[self.name], self.size, self.ranks)


def ring(times: int, size: float, ranks: int) -> float:
    """Bytes that a rank sends where a ring goes round `times` times."""
    return times * size * (ranks - 1) / ranks


class Counted(TorchDispatchMode):
    """Notes all collectives within it, those that DistributedDataParallel calls from C++ in a backward as well.

    Raises AssertionError for one that it does not know: none is left out without a word.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func._schema.name.partition("::")
        if space in ("c10d", "_c10d_functional") and name not in SILENT:
            assert space == "c10d" and name in RINGS, f"{space}::{name}: its bytes are not known"
            sizes = [_bytes(argument) for argument in args]  # of outputs and of inputs, where they are not the same
            self.found.append(Collective(name, max(sizes), _group(args).size()))
        return func(*args, **(kwargs or {}))


def _bytes(argument: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(argument) if isinstance(t, torch.Tensor))


def _group(args: Any) -> dist.ProcessGroup:
    (group,) = (arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()))
    return dist.ProcessGroup.unbox(group)
