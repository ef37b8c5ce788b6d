"""`run.mlp`: who computes the MLPs of a run, our kernels or quack, by trying both at the shape of the run.

What a GPU gains by quack's epilogues depends on it and on the sizes, so both are timed, forward and backward, where
quack can be used at all and is right. The choice is kept in a file, so that a run that is resumed goes on as it was.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from ..files import cache_folder
from ..rng import generator
from .attention import in_short
from .measured_choice import (
    forget_memory,
    median_seconds,
    read_choices,
    rounding_unit,
    setting,
    tried,
    write_choices,
)
from .mlp_products import PACKAGE, MLPProducts, mlp_products, why_not

Record = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]
"""Records a function as a CUDA graph, running none of it: (what runs it, what the function returned)."""

NAMES = ("kernels", "quack")
CHECKED = 64
"""Rows that are compared with float64."""


class Shape(NamedTuple):
    """The sizes of an MLP: rows of `width` numbers, `inner` of them between its layers."""

    rows: int
    width: int
    inner: int


class Choice(NamedTuple):
    """Who computes, and a line about how that was found; empty: there was nothing to find."""

    name: str
    said: str = ""


class Comparison(NamedTuple):
    """The outcome of trying both."""

    seconds: dict[str, float]
    """Times of a forward with backward, by name."""
    passed_over: dict[str, str]
    """Reasons for those that were not timed."""

    def choice(self) -> Choice:
        """The one with the least time; our kernels if none could be timed."""
        name = min(self.seconds, key=lambda name: self.seconds[name], default="kernels")
        times = [f"{other} {1e3 * seconds:.3g} ms" for other, seconds in self.seconds.items()]
        found = [*times, *(f"{other}: {reason}" for other, reason in self.passed_over.items())]
        return Choice(name, f"MLP by {name} ({'; '.join(found)})")


def choose(
    asked: str,
    device: torch.device,
    dtype: torch.dtype,
    shape: Shape,
    clock: Callable[[], float],
    cache: Path | None = None,
    *,
    unfit: str | None = None,
    record: Record | None = None,
) -> Choice:
    """Who is to compute the MLPs of a step: the one that is asked for, or for "auto" the fastest right one.

    dtype: of the step's products; clock: gives seconds; cache: the file that holds earlier choices, None: the user's;
    unfit: why quack cannot be part of such a step; record: the step is a CUDA graph, so each is tried as one as well.
    "auto" is "kernels" without a word where quack cannot be used. Raises ConfigError if quack is asked for and cannot
    be used, raises at this shape or is wrong.
    """
    if asked == "kernels":
        return Choice("kernels")
    reason = unfit or why_not(device, dtype, shape.width, shape.inner)
    if asked == "auto":
        return Choice("kernels") if reason else remembered(device, dtype, shape, clock, cache or cache_path(), record)
    reason = reason or Case(device, dtype, shape).fault("quack", record)
    if reason:
        raise ConfigError(f"run.mlp {asked}: {reason}")
    forget_memory(device)
    return Choice(asked)


def remembered(
    device: torch.device,
    dtype: torch.dtype,
    shape: Shape,
    clock: Callable[[], float],
    cache: Path,
    record: Record | None,
) -> Choice:
    """The choice that the file `cache` holds for this case; else it is made, and kept if both could be timed."""
    sizes = " ".join(f"{name}={size}" for name, size in shape._asdict().items())
    how = "; CUDA graph" if record else ""
    key = f"{setting(device, dtype, [PACKAGE, 'nvidia-cutlass-dsl', 'triton'])}; {sizes}{how}"
    known = read_choices(cache).get(key)
    if isinstance(known, dict) and known.keys() == set(NAMES) and all(isinstance(t, float) for t in known.values()):
        return Comparison(known, {}).choice()
    found = compare(device, dtype, shape, clock, record)
    if not found.passed_over:
        write_choices(cache, read_choices(cache) | {key: found.seconds})
    return found.choice()


def compare(
    device: torch.device, dtype: torch.dtype, shape: Shape, clock: Callable[[], float], record: Record | None = None
) -> Comparison:
    """Try and time both. One that raises or is wrong is passed over."""
    try:
        case = Case(device, dtype, shape)
    except torch.OutOfMemoryError as error:
        return Comparison({}, dict.fromkeys(NAMES, in_short(error)))
    found = tried(NAMES, partial(case.fault, record=record), partial(case.seconds, clock=clock))
    del case
    forget_memory(device)
    return Comparison(*found)


class Case:
    """Operands of one shape, and what they come to in float64 in some of the rows."""

    def __init__(self, device: torch.device, dtype: torch.dtype, shape: Shape) -> None:
        rows, D, inner = shape
        source = generator(0, 0, 0, "mlp", device)

        def normal(*sizes: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(sizes, generator=source, device=device)).to(dtype)

        self.device, self.dtype = device, dtype
        self.tolerance = 2 * rounding_unit(device, dtype)
        self.h, self.dout = normal(rows, D), normal(rows, D)
        self.w1, self.b1, self.w2 = normal(inner, D, scale=D**-0.5), normal(inner), normal(D, inner, scale=D**-0.5)
        n = min(rows, CHECKED)
        self.checked = torch.arange(n, device=device) * (rows - 1) // max(n - 1, 1)  # the first, the last, some between
        h, dout, w1, b1, w2 = (
            value.double() for value in (self.h[self.checked], self.dout[self.checked], self.w1, self.b1, self.w2)
        )
        u = F.linear(h, w1, b1)
        du = torch.ops.aten.gelu_backward(dout @ w2, u, approximate="tanh")
        out = F.gelu(u, approximate="tanh")
        self.right = {
            "first product": u,
            "result": out,
            "gradient": du,
            "bias gradient": du.sum(0),
            "result in the backward": out,
        }

    def results(self, products: MLPProducts) -> tuple[Tensor, ...]:
        """u, inner, du, db1 and inner again, for a gradient that is zero in all rows but the checked ones: db1 is the
        sum over all rows."""
        u, inner = products.forward(self.h, self.w1, self.b1)
        dout = torch.zeros_like(self.dout).index_copy_(0, self.checked, self.dout[self.checked])
        return u, inner, *products.backward(dout, self.w2, u, self.b1)

    def fault(self, name: str, record: Record | None = None) -> str | None:
        """Why one must not be used, after trying it. Errors are relative to the norm of the right result."""
        try:
            products = mlp_products(name, self.h, self.dtype)
            wrong = self._wrong(products, self.results(products))
            if wrong or record is None:
                return wrong
            replay, results = record(lambda: self.results(products))
            for _ in range(2):  # the first run must leave everything as it was
                for value in results:
                    value.fill_(math.nan)
                replay()
                wrong = wrong or self._wrong(products, results)
            return wrong and f"{wrong}, in a CUDA graph"
        except Exception as error:  # whatever a package raises
            return in_short(error)

    def _wrong(self, products: MLPProducts, results: tuple[Tensor, ...]) -> str | None:
        for value, (what, right) in zip(results, self.right.items(), strict=True):
            found = value if value.dim() == 1 else value[self.checked].double()
            if what == "first product" and products.defers_bias:
                found = found + self.b1
            error = float((found - right).norm() / right.norm())
            if not error <= self.tolerance:
                return f"its {what} is wrong: relative error {error:.1e}"
        return None

    def forward_backward(self, products: MLPProducts) -> None:
        """What a step asks of them."""
        u, _ = products.forward(self.h, self.w1, self.b1)
        products.backward(self.dout, self.w2, u, self.b1)

    def seconds(self, name: str, clock: Callable[[], float]) -> float:
        """The median time of a forward with backward."""
        products = mlp_products(name, self.h, self.dtype)
        return median_seconds(lambda: self.forward_backward(products), clock, self.device)


def cache_path() -> Path:
    """The path of mlp.json in the user's cache folder."""
    return cache_folder() / "mlp.json"
