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
def _falling(z):
    """e^-z, at most e^40, as the product of two must not overflow: sigma(z) is then 4e-18."""
    return tl.minimum(tl.exp(-z), 2.3538526683702e17)


@jit
def times_sigmoid_increment(h, dh, z, dz):
    """The increment of h sigma(z): with e = e^-z and f = e^-(z + dz), sigma(z + dz) = (1 + e) / ((1 + e) (1 + f)) and
    its increment is (e - f) / ((1 + e) (1 + f)), so that one division does for all."""
    start = _falling(z)
    end = _falling(z + dz)
    near = tl.where(tl.abs(dz) <= 0.5, dz, 0.0)
    # NaN is not lost: it comes from h or dh, by which all is multiplied.
    fall = tl.where(tl.abs(dz) <= 0.5, -expm1(-near) * start, start - end)
    share = 1 / ((1 + start) * (1 + end))
    return share * (dh * (1 + start) + h * fall)
