"""Improved precision and recall: which samples lie among the reference, and which of the reference among the samples
(arXiv 1904.06991)."""

from typing import NamedTuple

import torch
from torch import Tensor

NEIGHBOUR = 3
"""k, as in the paper and in ADM's evaluator."""
ENTRIES = 2**26
"""Distances that are held at a time: 256 MiB."""


class PrecisionRecall(NamedTuple):
    """Fractions."""

    precision: float
    recall: float


def precision_recall(
    samples: Tensor, reference: Tensor, *, k: int = NEIGHBOUR, device: torch.device | str = "cpu"
) -> PrecisionRecall:
    """Precision: the fraction of samples [N, D] within the ball of some sample of the reference [M, D], whose radius is
    the distance to its k-th neighbour there. Recall: the same with both exchanged.

    Distances are float32; ADM's evaluator has float16. Raises ValueError for sets of k samples or fewer, and for
    features not finite.
    """
    if min(len(samples), len(reference)) <= k:
        raise ValueError(f"neighbour {k} needs more than {k} samples of each, got {len(samples)} and {len(reference)}")
    if not (samples.isfinite().all() and reference.isfinite().all()):
        raise ValueError("features are not finite")
    centre = reference.mean(0)  # distances stay, and squares that are subtracted from each other become small
    a, b = (samples - centre).float().to(device), (reference - centre).float().to(device)
    return PrecisionRecall(_fraction_within(a, b, _radii(b, k)), _fraction_within(b, a, _radii(a, k)))


def _radii(x: Tensor, k: int) -> Tensor:
    """Squared distance of each row [N, D] to its k-th neighbour; it is itself the nearest."""
    return torch.cat([_squared(part, x).kthvalue(k + 1).values for part in _parts(x, len(x))])


def _fraction_within(x: Tensor, centres: Tensor, radii: Tensor) -> float:
    within = [(_squared(part, centres) <= radii).any(1) for part in _parts(x, len(centres))]
    return float(torch.cat(within).double().mean())


def _parts(x: Tensor, columns: int) -> tuple[Tensor, ...]:
    return x.split(max(1, ENTRIES // columns))


def _squared(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances [N, M] of rows [N, D] and [M, D]."""
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp_(min=0)
