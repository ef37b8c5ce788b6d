"""Pairs for the tests, each one tensor [2, ...], and how an increment is held against the float64 difference of the
plain operation at both ends."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

STEPS = (1.0, 0.1, 1e-3, 1e-5, 1e-7)
"""Sizes of increments; 1e-3 is the usual one."""


def pair(
    shape: Sequence[int], step: float, seed: int, device: str, dtype: torch.dtype = torch.float32
) -> Tensor:  # fmt: skip
    """A value of size 1 and an increment of size `step`."""
    h, dh = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))
    return torch.stack([h, step * dh]).to(device, dtype)


def token_pairs(
    B: int, T: int, D: int, step: float, device: str, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Tensor]:  # fmt: skip
    """Pairs of x, y [B, T, D] and gate, shift, scale [B, D]."""
    tokens = [pair((B, T, D), step, seed + i, device, dtype) for i in range(2)]
    return tokens + [pair((B, D), step, seed + 2 + i, device, dtype) for i in range(3)]


def ends(*pairs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The values at the start and at the end, in float64."""
    return [p[0].double() for p in pairs], [p[0].double() + p[1].double() for p in pairs]


def check(
    got: Tensor | tuple[Tensor, ...],
    plain: Callable[..., Tensor | tuple[Tensor, ...]],
    pairs: Sequence[Tensor],
    tolerance: float = 1e-5,
    constants: Sequence[Tensor] = (),
) -> None:
    """The increments of results against the differences of `plain`, relative to their own norms."""
    start, end = (plain(*values, *constants) for values in ends(*pairs))
    start, end = ((v if isinstance(v, tuple) else (v,)) for v in (start, end))
    for found, a, b in zip(got if isinstance(got, tuple) else (got,), start, end, strict=True):
        wanted = b - a
        assert found.shape == wanted.shape
        if wanted.numel():
            error = (found.double() - wanted).norm() / wanted.norm().clamp_min(1e-300)
            assert error <= tolerance, float(error)
