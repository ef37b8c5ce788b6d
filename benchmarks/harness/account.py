"""The costs of a step beside its time: FLOPs, bytes moved, memory; each recipe alone, before the race."""

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.harness.recipes import plain_operations
from benchmarks.harness.timing import release, synchronize
from soflow_fast.models.attention import flop_counter
from soflow_fast.training.state import TrainState


@contextlib.contextmanager
def countable() -> Iterator[None]:
    """Operations one by one: a counter knows PyTorch's products, not those inside of a kernel or of compiled code."""
    with torch.compiler.set_stance("force_eager"), plain_operations():
        yield


class Flops(TorchDispatchMode):
    """Counts the FLOPs of products and attention by torch's formulas. Its own counter would follow the modules as well,
    which it cannot under torch.func."""

    def __init__(self) -> None:
        super().__init__()
        self.formulas = flop_counter().flop_registry
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = self.formulas.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def flops(work: Callable[[], object]) -> int:
    """FLOPs of the products in some work."""
    with countable(), Flops() as counter:
        work()
    return counter.total


def forward_flops(state: TrainState, x: Tensor) -> int:
    """FLOPs of one forward of the network on x."""
    t = torch.ones(len(x), device=x.device)
    with torch.no_grad():
        return flops(lambda: state.flow.network(x, t, t))


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write: every tensor that goes in or comes out, views excepted.

    An operation of ours, kernel or not, counts as one. Compiled code is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if not func.is_view and not name.startswith(("aten::empty", "aten::new_empty", "aten::_unsafe_view")):
            changed = [a for a, spec in zip(args, func._schema.arguments, strict=False) if written(spec)]
            results = changed if changed else out
            self.bytes += sum(map(size, tree_leaves((args, kwargs, results))))
        return out


def written(argument: Any) -> bool:
    """Whether an operation changes an argument."""
    return argument.alias_info is not None and argument.alias_info.is_write


def size(value: object) -> int:
    """Bytes of a tensor; of an expanded one, those that are there. 0 for anything else."""
    if not isinstance(value, Tensor):
        return 0
    stored = value.untyped_storage().nbytes() if value.device.type != "meta" else value.nbytes
    return min(value.numel() * value.element_size(), stored)


def bytes_moved(work: Callable[[], object]) -> int:
    """Bytes that the operations of some work read and write."""
    with Traffic() as traffic:
        work()
    return traffic.bytes


def kept_for_backward(state: TrainState, work: Callable[[], object]) -> int:
    """Bytes that autograd keeps for the backward, by saved_tensors_hooks: each storage once, weights excepted."""
    network = state.flow.network
    mine = [*network.parameters(), *network.buffers()]
    known = {tensor.untyped_storage().data_ptr() for tensor in mine}
    kept: dict[int, Tensor] = {}  # the tensors stay alive, so that no address is given out twice

    def pack(tensor: Tensor) -> Tensor:
        if not tensor._is_zerotensor():  # a tangent of zero is kept as a word for it
            place = tensor.untyped_storage().data_ptr()
            if place not in known:
                kept.setdefault(place, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def allocated_peak(work: Callable[[], object]) -> int:
    """The most bytes on the CPU that some work has allocated and not freed at once, by torch's profiler.

    What was there before counts only as it is freed. What a library takes from the system by itself is not seen.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    now = peak = 0
    for event in sorted(changes, key=lambda event: event["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return peak


def peak_memory(step: Callable[[], object], device: torch.device, steps: int = 2) -> tuple[int | None, int | None]:
    """Peak bytes allocated and reserved over some steps after a first; None on a CPU, whose peak is the whole
    process's."""
    if device.type != "cuda":
        return None, None
    step()
    synchronize(device)
    release()
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(steps):
        step()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
