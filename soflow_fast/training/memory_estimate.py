"""What a training step needs of a GPU's memory, without a GPU: the real step on tensors without data, every storage
that it makes counted as the caching allocator would.

The tensors say that they are on a GPU but are not: torch without CUDA has no autograd for CUDA tensors, with data or
without. Not counted are what libraries allocate inside one operation (workspaces of cuBLAS, partial sums of our own
kernels: tens of MB), the CUDA context, and what the allocator loses between its blocks.
"""

import contextlib
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from soflow_kernels import _dispatch

from ..config.schema import Config
from ..errors import ConfigError
from . import state as state_module
from .consistency_target import resolve_quotient
from .optimizer import copies_of
from .state import TrainState, resolve_precision
from .step import draw, train_step

BLOCK = 512
"""Bytes that the caching allocator rounds up to."""
USABLE = 0.9
"""Of a GPU's free memory; the rest is for what is not counted."""


@dataclass(frozen=True)
class Ledger:
    """Bytes that are in use at the peak of a step, by what they are for. The first eight add up to `peak`."""

    weights: int
    """What products take, and buffers: copies in low precision, and the parameters that have none."""
    masters: int
    """The parameters that have copies."""
    moments: int
    """The optimiser's state."""
    averages: int
    """EMA and teacher."""
    gradients: int
    activations: int
    """What was there when a backward began: all that autograd keeps for it, and the batch."""
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


def describe(ledger: Ledger) -> str:
    """A table of the parts and their sum, in GB (10^9 bytes)."""
    rows = {**ledger.parts(), "peak": ledger.peak}
    return "\n".join(f"{name:<13}{size / 1e9:8.3f} GB" for name, size in rows.items())


def summary(ledger: Ledger) -> str:
    """The peak and its parts in one line."""
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in ledger.parts().items() if size)
    micro = f" in micro-batches of {ledger.micro_batch}" if ledger.micro_batch < ledger.batch else ""
    return f"{ledger.peak / 1e9:.2f} GB at its peak, {ledger.precision}, batch {ledger.batch}{micro}: {parts}"


class Storages(TorchDispatchMode):
    """Within the context, which storages are made and freed, in order. Views of one are one."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.live: dict[int, int] = {}  # the address of a storage that is in use -> its number
        self.log: list[int] = []  # numbers of storages, k when it is made and ~k when it is freed
        self._references: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return _unknown(args[0])
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
            self.log.append(k)
        return self.live[address]

    def _free(self, address: int, k: int) -> None:
        del self.live[address], self._references[k]
        self.log.append(~k)

    def peak(self, first: int) -> set[int]:
        """The storages in use at the moment, from event `first` of the log on, when they were largest together."""
        used = most = 0
        at = 0
        for i, k in enumerate(self.log):
            used += self.sizes[k] if k >= 0 else -self.sizes[~k]
            if i >= first and used > most:
                most, at = used, i
        found: set[int] = set()
        for k in self.log[: at + 1]:
            if k >= 0:
                found.add(k)
            else:
                found.remove(~k)
        return found


def _unknown(tensor: Tensor) -> bool | int | float:
    """What the host reads off a tensor without data: finite, a label that exists, a factor of one."""
    return {torch.bool: True}.get(tensor.dtype, 1.0 if tensor.is_floating_point() else 1)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    inherited = name not in owner.__dict__
    before = None if inherited else owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        if inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _apply(module: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply`, which swaps parameters without data in place and cannot where anything refers to them."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(convert(parameter.detach()), parameter.requires_grad)
        part._buffers.update({name: convert(value) for name, value in part._buffers.items() if value is not None})
    return module


def _deepcopy(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """A copy of a tensor without data; torch's would copy the mode that it belongs to."""
    copied = tensor.detach().clone()
    memo[id(tensor)] = nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
    return memo[id(tensor)]


def _fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What torch picks on a GPU; without one it would pick by the processor."""
    if q.dtype == torch.float32:
        kept = torch.is_grad_enabled()
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, kept)[0]
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


@contextlib.contextmanager
def _without_data(device: str) -> Iterator[None]:
    """Tensors hold no data, and on "cuda" go the ways of tensors on a GPU."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        stack.enter_context(_replaced(nn.Module, "_apply", _apply))
        stack.enter_context(_replaced(FakeTensor, "__deepcopy__", _deepcopy))
        if torch.device(device).type == "cuda":
            gpu = torch.device("cuda")
            stack.enter_context(_replaced(FakeTensor, "is_cuda", property(lambda tensor: True)))
            # As in a process of its own, whatever has been switched off in this one.
            stack.enter_context(_replaced(_dispatch, "_mode", os.environ.get("SOFLOW_KERNELS", "auto")))
            stack.enter_context(_replaced(_dispatch, "triton", _dispatch.triton or object()))
            stack.enter_context(_replaced(F, "scaled_dot_product_attention", _fused_attention))
            stack.enter_context(
                _replaced(state_module, "resolve_quotient", lambda c, p, _: resolve_quotient(c, p, gpu))
            )
            stack.enter_context(_replaced(state_module, "resolve_precision", lambda name, _: _precision(name)))
        yield


def _precision(name: str) -> str:
    """The precision of a step on a GPU: on this machine's where it has one."""
    if name == "auto" and not torch.cuda.is_available():
        return "bf16"
    return resolve_precision(name, torch.device("cuda"))


def ledger(config: Config, *, device: str = "cuda", batch: int | None = None) -> Ledger:
    """What one step of `config` on `batch` images (by default all of its batch) needs on a GPU, or on the CPU.

    At its peak over a run: the moments are there, and the quotient is checked. Needs no GPU and makes no number.
    fp8 is counted as bf16, compiled blocks and a recorded step as the plain one.
    Raises ConfigError naming a wrong field.
    """
    # What needs a GPU or a compiler, by what is like it: torch's optimiser has the state of apex's.
    optimizer = "torch" if config.run.optimizer == "apex" else config.run.optimizer
    run = replace(config.run, device="cpu", optimizer=optimizer, compile=False, cuda_graph=False)
    precision = "bf16" if config.precision == "fp8" else config.precision
    B = config.batch_size if batch is None else batch
    with _without_data(device), Storages() as storages:
        state = TrainState.build(replace(config, batch_size=B, precision=precision, run=run))
        found = measure(state, storages)
    return replace(found, precision="fp8") if config.precision == "fp8" else found


def measure(state: TrainState, storages: Storages) -> Ledger:
    """What a step of a new state, built while `storages` counted, needs at its peak."""
    config, model = state.config, state.config.model
    B = config.batch_size // state.world
    parts = -(-B // min(config.micro_batch if config.micro_batch > 0 else B, B))
    size = -(-B // parts)
    # The second micro-batch finds gradients, and the others are like it: two will do, beside the rest of the batch.
    n = min(B, 2 * size)
    state.config = replace(config, batch_size=n * state.world, micro_batch=size)

    def images(n: int) -> tuple[Tensor, Tensor]:
        shape = (n, model.in_channels, model.input_size, model.input_size)
        return torch.zeros(shape, device=state.device), torch.zeros(n, dtype=torch.int64, device=state.device)

    train_step(state, *images(1))  # makes the moments
    state.step = max(config.run.check_quotient_every, 1) - 1
    rest = (images(B - n), draw(state, images(B - n)[0].shape)) if n < B else None
    batch = images(n)
    first = len(storages.log)
    static = _static(state, storages)
    kept: set[int] = set()
    backward = torch.autograd.backward

    def noted_backward(*arguments: Any, **named: Any) -> None:
        kept.update(storages.live.values())
        backward(*arguments, **named)

    with _replaced(torch.autograd, "backward", noted_backward):
        train_step(state, *batch)
    del rest
    found = storages.peak(first)
    gradients = {storages.number(p.grad) for p in state.flow.parameters() if p.grad is not None}
    sums: dict[str, int] = {}
    left = found
    for name, numbers in {**static, "gradients": gradients, "activations": kept, "workspace": found}.items():
        sums[name] = sum(storages.sizes[k] for k in left & numbers)
        left = left - numbers
    return Ledger(**sums, peak=sum(sums.values()), batch=B, micro_batch=size, precision=state.precision)


def _static(state: TrainState, storages: Storages) -> dict[str, set[int]]:
    """The storages that last from step to step."""

    def numbers(tensors: Iterable[Tensor | None]) -> set[int]:
        return {storages.number(tensor) for tensor in tensors if tensor is not None}

    def all_of(*modules: nn.Module | None) -> list[Tensor]:
        return [tensor for module in modules if module for tensor in (*module.parameters(), *module.buffers())]

    optimizer: Any = state.optimizer
    copies = copies_of(state.flow.network)
    pairs = list(zip(state.flow.network.parameters(), copies, strict=True))
    plain = [parameter for parameter, copy in pairs if copy is None]
    return {
        "weights": numbers([*copies, *plain, *state.flow.buffers()]),
        "masters": numbers(parameter for parameter, copy in pairs if copy is not None),
        "moments": numbers(value for kept in optimizer.state.values() for value in tree_leaves(kept)),
        "averages": numbers(all_of(state.ema, state.teacher)),
    }


def largest_micro_batch(config: Config, memory: int) -> int:
    """The largest micro-batch whose step is predicted to stay within the usable part of so many bytes on a GPU.

    A batch is cut into as few parts as fit, near-equal ones: what is predicted grows nearly evenly with their size, so
    that a few ledgers suffice. Raises ConfigError where not even single images fit.
    """
    limit, B = USABLE * memory, config.batch_size
    known: dict[int, int] = {}

    def peak(size: int) -> int:
        if size not in known:
            known[size] = ledger(replace(config, micro_batch=size)).peak
        return known[size]

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
