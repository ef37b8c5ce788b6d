"""Images with an exact solution: Gaussians whose covariances share the cosine basis, with spectra like photographs'.

An image [1, N, N] and its coefficients [N * N] in the orthonormal basis of the discrete cosine transform (DCT-II) are
one another's rotation, so white noise is white in both, and a mixture with diagonal covariances of the coefficients
(`Mixture`) says what velocity and solution of the images are. The deviation of a coefficient falls as a power of its
frequency; about 1 / frequency is what photographs have (Field 1987; Ruderman and Bialek 1994).
"""

import itertools
import math

import torch
from torch import Tensor

from benchmarks.exact.mixture import Mixture

EDGES = (4.0, 8.0, 16.0, 32.0)
"""Frequencies at which one band ends and the next begins, in half waves per image."""
VARIANCE = 0.25
"""Mean variance of a pixel within each component."""
MEAN = 0.3
"""Root mean square of each component's mean image, of frequencies below 4 alone."""
EXPONENTS = (0.8, 1.0, 1.2)
"""The power of 1 / (1 + frequency) by which each component's deviations fall."""
WEIGHTS = (0.3, 0.4, 0.3)


def cosines(side: int) -> Tensor:
    """The orthonormal DCT-II, float64 [side, side]: row u is the cosine of u half waves."""
    place = torch.arange(side, dtype=torch.float64)
    rows = torch.cos(math.pi / side * (place + 0.5) * place[:, None]) * math.sqrt(2 / side)
    rows[0] /= math.sqrt(2)
    return rows


def frequencies(side: int) -> Tensor:
    """The frequency of each coefficient, sqrt(u^2 + v^2) half waves per image, float64 [side * side]."""
    u = torch.arange(side, dtype=torch.float64)
    return torch.hypot(u[:, None], u[None]).flatten()


def bands(side: int) -> list[Tensor]:
    """Which coefficients belong to each band, coarse first, bool [side * side] each; bands that are empty are left
    out."""
    r = frequencies(side)
    ends = [0.0, *EDGES, math.inf]
    found = [(low <= r) & (r < high) for low, high in itertools.pairwise(ends)]
    return [band for band in found if band.any()]


def to_images(z: Tensor, side: int) -> Tensor:
    """Coefficients [B, side * side] -> images [B, 1, side, side], in their dtype."""
    basis = cosines(side).to(z.dtype)
    return (basis.T @ z.reshape(-1, side, side) @ basis)[:, None]


def to_coefficients(x: Tensor) -> Tensor:
    """Images [B, 1, side, side] -> coefficients [B, side * side], in their dtype."""
    basis = cosines(x.shape[-1]).to(x.dtype)
    return (basis @ x[:, 0] @ basis.T).flatten(1)


def photographs(side: int = 32, seed: int = 0) -> Mixture:
    """The mixture of the coefficients: three components, each with a smooth mean and a spectrum of its own."""
    r = frequencies(side)
    deviations = torch.stack([(1 + r) ** -power for power in EXPONENTS])
    deviations *= (VARIANCE * side**2 / deviations.square().sum(1, keepdim=True)).sqrt()
    means = torch.randn(len(EXPONENTS), side**2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    means *= (r < EDGES[0]) / (1 + r)
    means *= (MEAN**2 * side**2 / means.square().sum(1, keepdim=True)).sqrt()
    return Mixture(torch.tensor(WEIGHTS, dtype=torch.float64), means, deviations)


def one_gaussian(mixture: Mixture) -> Mixture:
    """The single Gaussian with the mixture's mean and the variances of its coefficients: what one who saw no more than
    the spectrum would take the data for."""
    weights = mixture.weights[:, None]
    mean = (weights * mixture.means).sum(0, keepdim=True)
    variance = (weights * (mixture.deviations**2 + mixture.means**2)).sum(0, keepdim=True) - mean**2
    return Mixture(torch.ones(1, dtype=torch.float64), mean, variance.sqrt(), mixture.path)
