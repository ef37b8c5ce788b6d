"""The increment of h sigma(z), which GELU and SiLU share.

sigma(z + dz) - sigma(z) = sigma(z + dz) sigma(-z) (1 - e^-dz)
d(h sigma(z)) = dh sigma(z + dz) + h (sigma(z + dz) - sigma(z))
"""

import torch
from torch import Tensor

from soflow_kernels._dispatch import jit, tl
from soflow_kernels._math import expm1

LARGE = 0.5
"""The largest increment of an exponent for the identities, which would overflow. Above it nothing cancels, and the
difference itself is taken."""


def sigmoid_increment(z: Tensor, dz: Tensor) -> Tensor:
    """sigmoid(z + dz) - sigmoid(z)."""
    end = torch.sigmoid(z + dz)
    small = -torch.expm1(-dz.clamp(-LARGE, LARGE)) * end * torch.sigmoid(-z)
    return torch.where(dz.abs() <= LARGE, small, end - torch.sigmoid(z))


@jit
def _sigmoid(z):
    return 1 / (1 + tl.exp(-z))


@jit
def times_sigmoid_increment(h, dh, z, dz):
    """The increment of h sigma(z)."""
    start = _sigmoid(z)
    end = _sigmoid(z + dz)
    near = tl.where(tl.abs(dz) <= 0.5, dz, 0.0)
    small = -expm1(-near) * end * _sigmoid(-z)
    # Comparisons that are false for NaN let it through by the difference.
    dsigma = tl.where(tl.abs(dz) <= 0.5, small, end - start)
    return dh * end + h * dsigma
