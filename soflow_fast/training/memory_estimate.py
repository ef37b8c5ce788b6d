"""The memory that a training step needs on a GPU, predicted without one: the real step runs on tensors without data,
and every storage that it makes is counted as the caching allocator would.

Left out is what libraries allocate inside one operation (workspaces of cuBLAS, partial sums of our own kernels: tens of
MB), the CUDA context, and what the allocator loses between its blocks.
"""

import weakref
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from soflow_kernels.testing import as_on_gpu

from ..config.schema import Config
from ..errors import ConfigError
from ..ranks import micro_batches
from .precision import resolve_precision
from .state import TrainState, no_conditions
from .step import draw, train_step

BLOCK = 512
"""Bytes that the caching allocator rounds up to."""
USABLE = 0.9
"""The part of a GPU's free memory that a step may take; the rest is for what is not counted."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes in use at the peak of a step, by purpose. `parts` add up to `peak`."""

    weights: int
    """Weights as the forward multiplies them, in low precision where there are masters, and buffers."""
    masters: int
    """Float32 masters of weights in low precision."""
    moments: int
    """The optimiser's state."""
    averages: int
    """EMA and teacher."""
    gradients: int
    activations: int
    """Whatever else is there when a backward begins: all that autograd keeps for it, and the batch."""
    workspace: int
    """The rest."""
    peak: int
    batch: int
    micro_batch: int
    """Samples in the largest forward with gradient."""
    precision: str

    def parts(self) -> dict[str, int]:
        """The bytes of each part of the peak, by name."""
        names = ("weights", "masters", "moments", "averages", "gradients", "activations", "workspace")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class PassingMemory:
    """Bytes that come and go in a step, at their peak, beside what lasts and the gradients of parameters."""

    activations: int
    """Whatever of them is there when a backward begins."""
    workspace: int
    """The rest of their peak before the update."""
    update: int
    """Their peak within the update."""


def summary(estimate: MemoryEstimate) -> str:
    """The peak and its parts in one line, in GB (10^9 bytes)."""
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in estimate.parts().items() if size)
    micro = f" in micro-batches of {estimate.micro_batch}" if estimate.micro_batch < estimate.batch else ""
    return f"{estimate.peak / 1e9:.2f} GB at its peak, {estimate.precision}, batch {estimate.batch}{micro}: {parts}"


class Storages(TorchDispatchMode):
    """Within the context, records which storages are made and freed, in order. Views of one storage count once."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        """Bytes of each storage, rounded up to whole blocks, by its number."""
        self.live: dict[int, int] = {}
        """The number of each storage that is in use, by its address."""
        self.events: list[int] = []
        """Numbers of storages, k when it is made and ~k when it is freed."""
        self._references: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return number_on_host(args[0])
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self.number(value)
        return out

    def number(self, tensor: Tensor) -> int:
        """The number of a tensor's storage, a new one if it was not known."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self.live:
            k = len(self.sizes)
            self.sizes.append(-(-storage.nbytes() // BLOCK) * BLOCK)
            self.live[address] = k
            self._references[k] = weakref.ref(storage, lambda _: self._free(address, k))
            self.events.append(k)
        return self.live[address]

    def _free(self, address: int, k: int) -> None:
        del self.live[address], self._references[k]
        self.events.append(~k)

    def peak(self, first: int, stop: int | None = None, without: Set[int] = frozenset()) -> set[int]:
        """The storages in use when they took the most memory together, at or after event `first` and before `stop`;
        those of `without` are neither counted nor returned."""
        used = most = at = 0
        for i, k in enumerate(self.events[:stop]):
            if (k if k >= 0 else ~k) not in without:
                used += self.sizes[k] if k >= 0 else -self.sizes[~k]
            if i >= first and used > most:
                most, at = used, i
        found: set[int] = set()
        for k in self.events[: at + 1] if most else ():
            if k >= 0:
                found.add(k)
            else:
                found.remove(~k)
        return found - without


def number_on_host(tensor: Tensor) -> bool | int | float:
    """The value that the host reads off a tensor without data: finite, a label that exists, a factor of one."""
    return {torch.bool: True}.get(tensor.dtype, 1.0 if tensor.is_floating_point() else 1)


def _fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The kernel that torch picks on a GPU; for these tensors it would pick one of the CPU's."""
    if q.dtype == torch.float32:
        kept = torch.is_grad_enabled()
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, kept)[0]
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


def estimate_memory(config: Config, *, device: str = "cuda", batch: int | None = None) -> MemoryEstimate:
    """The memory that one step of `config` on `batch` images (by default all of its batch) needs on a GPU or the CPU.

    It is the peak over a run: the moments are there, and the quotient is checked. Needs no GPU and computes no number.
    fp8 is counted as bf16 (of guidance as well), compiled blocks and a recorded step as the plain one.
    Raises ConfigError naming a wrong field.
    """
    counted = as_counted(config, batch, device)
    if torch.device(device).type == "cuda":
        with as_on_gpu(), Storages() as storages:
            found = measure_step(build_as_on_gpu(counted), storages)
    else:
        with FakeTensorMode(), Storages() as storages:
            found = measure_step(TrainState.build(counted), storages)
    return replace(found, precision="fp8") if config.precision == "fp8" else found


def as_counted(config: Config, batch: int | None = None, device: str = "cuda") -> Config:
    """The configuration of a step on tensors without data that is like one of `config` on the device.

    What needs a GPU or a compiler is replaced by what is like it: fp8 by bf16, apex's optimiser by torch's, compiled
    blocks and a recorded step by the plain one.
    """
    precision = "bf16" if config.precision == "fp8" else config.precision
    if precision == "auto" and torch.device(device).type == "cuda":  # this machine's where it has a GPU
        precision = resolve_precision("auto", torch.device("cuda")) if torch.cuda.is_available() else "bf16"
    optimizer = "torch" if config.run.optimizer == "apex" else config.run.optimizer
    run = replace(config.run, device="cpu", optimizer=optimizer, compile=False, cuda_graph=False)
    batch = config.batch_size if batch is None else batch
    return replace(config, batch_size=batch, precision=precision, guidance_precision="step", run=run)


def build_as_on_gpu(counted: Config) -> TrainState:
    """The state of a counted configuration within `as_on_gpu`."""
    state = TrainState.build(counted, resolve_for=torch.device("cuda"))
    attend_as_on_gpu(state)
    return state


def attend_as_on_gpu(state: TrainState) -> None:
    """Let the networks of a state take the attention that torch picks on a GPU."""
    state.set_attention(_fused_attention)


def images(state: TrainState, n: int) -> tuple[Tensor, Tensor]:
    """A batch of n images and their labels or vectors, all zeros."""
    model = state.config.model
    shape = (n, model.in_channels, model.input_size, model.input_size)
    return torch.zeros(shape, device=state.device), no_conditions(model, n, state.device)


def take_two_micro_batches(state: TrainState) -> tuple[int, int]:
    """Shorten the batch of a state to its first two micro-batches, or one if there is one; the second finds gradients,
    and the others are like it. Returns the micro-batches of the whole batch, and the samples of a rank that are left.
    """
    config = state.config
    B = config.batch_size // state.world
    parts = micro_batches(B, config.micro_batch)
    size = -(-B // parts)
    n = min(B, 2 * size)
    state.config = replace(config, batch_size=n * state.world, micro_batch=size)
    return parts, n


def measure_step(state: TrainState, storages: Storages) -> MemoryEstimate:
    """The memory that a step of a new state needs at its peak. The state was built while `storages` recorded."""
    step = _second_step(state, storages)
    left = at_peak = storages.peak(step.first)
    sums: dict[str, int] = {}
    purposes = {
        **step.lasting,
        "gradients": step.gradients,
        "activations": step.at_backward,
        "workspace": at_peak,
    }
    for name, numbers in purposes.items():
        sums[name] = sum(storages.sizes[k] for k in left & numbers)
        left = left - numbers
    return MemoryEstimate(
        **sums, peak=sum(sums.values()), batch=step.batch, micro_batch=step.micro_batch, precision=state.precision
    )


def estimate_passing(config: Config) -> PassingMemory:
    """What comes and goes in a step of `config` on a GPU; needs none. Counted as by `estimate_memory`. Raises
    ConfigError naming a wrong field."""
    with as_on_gpu(), Storages() as storages:
        return measure_passing(build_as_on_gpu(as_counted(config)), storages)


def measure_passing(state: TrainState, storages: Storages) -> PassingMemory:
    """What comes and goes in a step of a new state, which was built while `storages` recorded."""
    step = _second_step(state, storages)
    others = step.gradients | step.gradients_before | {k for numbers in step.lasting.values() for k in numbers}
    before = storages.peak(step.first, step.update, others)
    during = storages.peak(step.update, None, others)
    activations, every, update = (
        sum(storages.sizes[k] for k in numbers) for numbers in (before & step.at_backward, before, during)
    )
    return PassingMemory(activations, every - activations, update)


class _Step(NamedTuple):
    """A step as it was recorded: numbers of events, and of storages by their purpose."""

    first: int
    update: int
    """The event from which it updates."""
    lasting: dict[str, set[int]]
    gradients_before: set[int]
    gradients: set[int]
    at_backward: set[int]
    """Storages in use when a backward begins."""
    batch: int
    micro_batch: int


def _second_step(state: TrainState, storages: Storages) -> _Step:
    """Record the second step of a state, the first that finds moments; it checks the quotient if any does."""
    config = state.config
    B = config.batch_size // state.world
    n = take_two_micro_batches(state)[1]
    size = state.config.micro_batch

    def gradients() -> set[int]:
        return {storages.number(p.grad) for p in state.flow.parameters() if p.grad is not None}

    train_step(state, *images(state, 1))  # makes the moments
    state.step = max(config.run.check_quotient_every, 1) - 1
    rest = (images(state, B - n), draw(state, images(state, B - n)[0].shape)) if n < B else None
    batch = images(state, n)
    first = update = len(storages.events)
    lasting, before = _lasting(state, storages), gradients()
    at_backward: set[int] = set()

    def note(name: str, **values: Any) -> None:
        nonlocal update
        if name == "backward":
            at_backward.update(storages.live.values())
        if name == "update":
            update = len(storages.events)

    train_step(state, *batch, observe=note)
    del rest
    return _Step(first, update, lasting, before, gradients(), at_backward, B, size)


def _lasting(state: TrainState, storages: Storages) -> dict[str, set[int]]:
    """The storages that last from step to step, by purpose."""

    def numbers(tensors: Iterable[Tensor | None]) -> set[int]:
        return {storages.number(tensor) for tensor in tensors if tensor is not None}

    def all_of(*modules: nn.Module | None) -> list[Tensor]:
        return [tensor for module in modules if module for tensor in (*module.parameters(), *module.buffers())]

    optimizer: Any = state.optimizer
    masters = numbers(optimizer.masters)
    weights = numbers(all_of(state.flow))
    return {
        "weights": weights,
        "masters": masters - weights,
        "moments": numbers(value for kept in optimizer.state.values() for value in tree_leaves(kept)) - masters,
        "averages": numbers(all_of(state.ema, state.teacher)),
    }


def largest_micro_batch(config: Config, memory: int, peak: Callable[[Config], int] | None = None) -> int:
    """The largest micro-batch whose step is predicted to stay within the usable part of `memory` bytes on a GPU.

    peak: predicts the bytes of a configuration; None: `estimate_memory`. Raises ConfigError where not even single
    images fit.
    """

    def predict(size: int) -> int:
        tried = replace(config, micro_batch=size)
        return estimate_memory(tried).peak if peak is None else peak(tried)

    return largest_that_fits(config.batch_size, USABLE * memory, predict)


def largest_that_fits(batch: int, limit: float, predict: Callable[[int], int]) -> int:
    """The largest micro-batch of a batch whose predicted peak stays within `limit` bytes.

    A batch is cut into as few near-equal parts as fit. The prediction grows nearly evenly with their size, so that a
    few of them suffice. Raises ConfigError where not even single images fit.
    """
    B, peak = batch, cache(predict)
    if peak(B) <= limit:
        return B
    over, fits = (1, B), (B, 1)  # parts of a batch, and their size
    if peak(1) > limit:
        raise ConfigError(
            f"--micro-batch auto: single images need {peak(1) / 1e9:.1f} GB, and {limit / 1e9:.1f} GB are usable, "
            f"{USABLE:.0%} of what is free; take a smaller network"
        )
    while fits[0] - over[0] > 1:
        slope = (peak(over[1]) - peak(fits[1])) / (over[1] - fits[1])
        guess = int(fits[1] + (limit - peak(fits[1])) / slope)
        parts = min(max(-(-B // max(guess, 1)), over[0] + 1), fits[0] - 1)
        tried = parts, -(-B // parts)
        if peak(tried[1]) <= limit:
            fits = tried
        else:
            over = tried
    return fits[1]
