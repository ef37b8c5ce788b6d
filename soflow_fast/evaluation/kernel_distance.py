"""KID: the squared maximum mean discrepancy of two sets of features (arXiv 1801.01401)."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..rng import generator

SUBSETS, SUBSET_SIZE = 100, 1000
"""As torch-fidelity and the authors' code have them."""


class KernelDistance(NamedTuple):
    """The mean over subsets, and its deviation among them."""

    mean: float
    """May be below 0, as the estimate is unbiased."""
    deviation: float | None
    """None: there is one subset, which is all."""


def kernel_distance(
    a: Tensor,
    b: Tensor,
    *,
    subsets: int = SUBSETS,
    size: int = SUBSET_SIZE,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> KernelDistance:
    """The unbiased MMD^2 by the kernel (x . y / D + 1)^3 of features a [N, D] and b [M, D], in float64.

    subsets: how often `size` samples are drawn from each, or as many as the smaller set has; once is enough where that
    is all of both. seed: of the draws. Raises ValueError for fewer than two samples, and for features not finite.
    """
    size = min(size, len(a), len(b))
    if size < 2:
        raise ValueError(f"a kernel distance needs at least 2 samples of each, got {len(a)} and {len(b)}")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("features are not finite")
    if size == len(a) == len(b):
        subsets = 1
    found = []
    for k in range(subsets):
        x, y = (
            part[torch.randperm(len(part), generator=generator(seed, k, which, "kernel distance"))[:size]]
            for which, part in enumerate((a, b))
        )
        found.append(_squared_discrepancy(x.to(device).double(), y.to(device).double()))
    values = torch.tensor(found, dtype=torch.float64)
    return KernelDistance(float(values.mean()), float(values.std(correction=0)) if subsets > 1 else None)


def _squared_discrepancy(x: Tensor, y: Tensor) -> float:
    """Equation 4 of arXiv 1801.01401 for two sets of one size."""

    def kernel(u: Tensor, v: Tensor) -> Tensor:
        return (u @ v.T / u.shape[1] + 1) ** 3

    m = len(x)
    same = sum((k.sum() - k.diagonal().sum()) / (m * (m - 1)) for k in (kernel(x, x), kernel(y, y)))
    return float(same - 2 * kernel(x, y).mean())
