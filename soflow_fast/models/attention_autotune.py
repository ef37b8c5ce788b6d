"""`--attention auto`: the backend that is fastest at a run's shape, among those that compute the right thing there.

Which one that is depends on GPU, head dimension and length, and no rule is known that tells, so all are timed: forward,
and forward with backward, as a step makes both. The choice is kept in a file, by everything that it depends on.
"""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError
from ..files import cache_folder
from ..rng import generator
from .attention import (
    BACKENDS,
    PACKAGES,
    Backend,
    attention,
    in_short,
    packed_attention,
    require,
    takes_packed,
    why_not,
)
from .measured_choice import (
    forget_memory,
    median_seconds,
    read_choices,
    rounding_unit,
    setting,
    tried,
    write_choices,
)


class Shape(NamedTuple):
    """The shape of q, k and v."""

    B: int
    heads: int
    T: int
    head_dim: int


class Comparison(NamedTuple):
    """The outcome of trying every backend, by its name."""

    seconds: dict[str, tuple[float, float]]
    """Times of a forward, and of a forward with backward."""
    passed_over: dict[str, str]
    """Reasons for those that were not timed."""

    def fastest(self) -> str:
        """The backend with the least time for both; torch's own choice if none could be timed."""
        return min(self.seconds, key=lambda name: sum(self.seconds[name]), default="sdpa")


def choose(
    device: torch.device,
    dtype: torch.dtype,
    B: int,
    heads: int,
    T: int,
    head_dim: int,
    clock: Callable[[], float],
    cache: Path | None = None,
    *,
    compiled: bool = False,
    apart: bool = False,
) -> str:
    """The fastest right backend for q, k, v [B, heads, T, head_dim] of a dtype; `clock` gives seconds.

    compiled: it is to be part of compiled blocks, so one that torch.compile cannot take whole is not right. apart: q, k
    and v come as tensors of their own, as they do where q and k are normalised.
    On the CPU it is "sdpa". Elsewhere it is what the file `cache` (None: the user's) holds, or is measured and put
    there; a file that cannot be read or written only costs the measurement.
    """
    if device.type != "cuda":
        return "sdpa"
    return remembered(device, dtype, Shape(B, heads, T, head_dim), clock, cache or cache_path(), compiled, apart)


def remembered(
    device: torch.device,
    dtype: torch.dtype,
    shape: Shape,
    clock: Callable[[], float],
    cache: Path,
    compiled: bool,
    apart: bool = False,
) -> str:
    """The backend that the file `cache` holds for this case, if it can still be used; else it is measured."""
    key = _key(device, dtype, shape, compiled, apart)
    known = read_choices(cache).get(key)
    backend = known.get("backend") if isinstance(known, dict) else None
    if isinstance(backend, str) and backend in BACKENDS and why_not(backend, device, dtype, shape.head_dim) is None:
        return backend
    found = compare(device, dtype, shape, clock, compiled, apart)
    entry = {"backend": found.fastest(), **found._asdict()}
    write_choices(cache, read_choices(cache) | {key: entry})
    return found.fastest()


def try_out(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    B: int,
    heads: int,
    T: int,
    head_dim: int,
    *,
    compiled: bool = False,
    apart: bool = False,
) -> None:
    """Raise ConfigError if a backend that was asked for cannot be used here, raises at this shape or is wrong."""
    require(backend, device, dtype, head_dim)
    if backend == "sdpa":
        return
    fault = Case(device, dtype, Shape(min(B, 2), heads, T, head_dim), compiled, apart).fault(backend)
    if fault:
        raise ConfigError(f"--attention {backend}: {fault}")


def compare(
    device: torch.device,
    dtype: torch.dtype,
    shape: Shape,
    clock: Callable[[], float],
    compiled: bool = False,
    apart: bool = False,
) -> Comparison:
    """Try and time every backend. One that cannot be used, raises or is wrong is passed over."""
    case = Case(device, dtype, shape, compiled, apart)
    found = tried(BACKENDS, partial(_why_not, case), partial(case.seconds, clock=clock))
    del case
    forget_memory(device)
    return Comparison(*found)


def _why_not(case: "Case", backend: str) -> str | None:
    """Why a backend cannot be used for a case, or must not."""
    return why_not(backend, case.device, case.qkv.dtype, case.qkv.shape[-1]) or case.fault(backend)


def attend(qkv: Tensor, backend: Backend, apart: bool = False) -> Tensor:
    """Attention as in a DiT block: [B, T, 3, heads, d] -> [B, T, heads d]. apart: never in one tensor."""
    if not apart and takes_packed(backend, qkv.dtype, qkv.device.type):
        assert isinstance(backend, str)
        return packed_attention(qkv, backend).flatten(2)
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    return attention(q, k, v, backend).transpose(1, 2).flatten(2)


class Case:
    """Operands of one shape, and the right results in float64 for the first and the last sample."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, shape: Shape, compiled: bool = False, apart: bool = False
    ) -> None:
        B, heads, T, d = shape
        source = generator(0, 0, 0, "attention", device)
        self.device, self.compiled, self.apart = device, compiled, apart
        self.tolerance = 2 * rounding_unit(device, dtype)
        self.qkv = torch.randn(B, T, 3, heads, d, generator=source, device=device).to(dtype).requires_grad_()
        self.dout = torch.randn(B, T, heads * d, generator=source, device=device).to(dtype)
        self.checked = [0, B - 1]
        qkv = self.qkv.detach()[self.checked].double().requires_grad_()
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = ((q @ k.mT * d**-0.5).softmax(-1) @ v).transpose(1, 2).reshape(-1, T, heads * d)
        (gradient,) = torch.autograd.grad(out, qkv, self.dout[self.checked].double())
        self.right = out.detach(), gradient

    def forward(self, backend: str) -> Tensor:
        """The output. Compiled, it is recorded but left to eager kernels: what surrounds attention is not compared."""
        if not self.compiled:
            return attend(self.qkv, backend, self.apart)
        with torch._dynamo.config.patch(recompile_limit=64):  # one variant for each backend, and without gradient
            return torch.compile(attend, backend="eager", fullgraph=True, dynamic=False)(self.qkv, backend, self.apart)

    def forward_backward(self, backend: str) -> tuple[Tensor, Tensor]:
        """The output, and the gradient of the operands."""
        out = self.forward(backend)
        (gradient,) = torch.autograd.grad(out, self.qkv, self.dout)
        return out.detach(), gradient

    def fault(self, backend: str) -> str | None:
        """Why a backend must not be used, after trying it. Errors are relative to the norm of the right result."""
        try:
            with warnings.catch_warnings():  # a kernel of torch that gives up says why in warnings as well
                warnings.simplefilter("ignore")
                results = self.forward_backward(backend)
            for what, found, right in zip(("result", "gradient"), results, self.right, strict=True):
                error = float((found[self.checked] - right).norm() / right.norm())
                if not error <= self.tolerance:
                    return f"its {what} is wrong: relative error {error:.1e}"
        except Exception as error:  # each package has its own
            return in_short(error)
        return None

    def seconds(self, backend: str, clock: Callable[[], float]) -> tuple[float, float]:
        """The median times of a forward without gradient, and of a forward with backward."""
        with torch.no_grad():
            forward = median_seconds(lambda: self.forward(backend), clock, self.device)
        return forward, median_seconds(lambda: self.forward_backward(backend), clock, self.device)


def cache_path() -> Path:
    """The path of attention.json in the user's cache folder."""
    return cache_folder() / "attention.json"


def _key(device: torch.device, dtype: torch.dtype, shape: Shape, compiled: bool, apart: bool) -> str:
    """Everything that the choice depends on."""
    sizes = " ".join(f"{name}={size}" for name, size in shape._asdict().items())
    how = [name for name, holds in (("compiled", compiled), ("apart", apart)) if holds]
    return "; ".join([setting(device, dtype, [row.package for row in PACKAGES.values()]), sizes, *how])
