"""Gaussians fitted to features as they come, and the Frechet distance of two of them."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Gaussian:
    """The mean and the covariance of a set of features."""

    mean: np.ndarray
    """float64 [D]."""
    covariance: np.ndarray
    """float64 [D, D], with N - 1 in the denominator."""

    @classmethod
    def of(cls, features: Tensor | np.ndarray) -> "Gaussian":
        """Of features [N, D], N at least 2."""
        sums = GaussianSums()
        sums.add(torch.as_tensor(features))
        return sums.gaussian()


class GaussianSums:
    """Adds up features batch by batch, in float64, where they are.

    Deviations are taken from the mean of the first batch: without that, features whose mean is large beside their
    deviation would lose the latter in the difference of two large sums.
    """

    def __init__(self) -> None:
        self.count = 0
        self._origin: Tensor | None = None

    def add(self, features: Tensor) -> None:
        """Add a batch [n, D]."""
        if not len(features):
            return
        x = features.detach().double()
        if self._origin is None:
            self._origin = x.mean(0)
            self._sum, self._products = torch.zeros_like(self._origin), x.new_zeros(x.shape[1], x.shape[1])
        x = x - self._origin
        self.count += len(x)
        self._sum += x.sum(0)
        self._products.addmm_(x.T, x)

    def gaussian(self) -> Gaussian:
        """Of all that was added. Raises ValueError for fewer than two."""
        if self.count < 2 or self._origin is None:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}")
        mean = self._sum / self.count
        covariance = (self._products - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return Gaussian((mean + self._origin).cpu().numpy(), covariance.cpu().numpy())


def frechet(a: Gaussian, b: Gaussian) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) (Dowson and Landau 1982; FID: arXiv 1706.08500, equation 6).

    The trace of (A B)^(1/2) is that of (A^(1/2) B A^(1/2))^(1/2), which is symmetric: two symmetric eigenvalue problems
    in float64. Eigenvalues within rounding of zero are taken for zero: their roots would be a hundred million times as
    large as they are. So singular covariances, of fewer samples than dimensions, need no ridge.

    Raises ValueError if the dimensions differ or a number is not finite.
    """
    from scipy.linalg import eigh

    if a.mean.shape != b.mean.shape:
        raise ValueError(f"Gaussians of {a.mean.shape[0]} and of {b.mean.shape[0]} dimensions have no distance")
    if not all(np.isfinite(part).all() for one in (a, b) for part in (one.mean, one.covariance)):
        raise ValueError("a mean or a covariance is not finite")
    values, vectors = eigh(a.covariance)
    root = (vectors * _roots(values)) @ vectors.T
    product = root @ b.covariance @ root
    cross = _roots(eigh((product + product.T) / 2, eigvals_only=True)).sum()
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    return float(((a.mean - b.mean) ** 2).sum() + traces - 2 * cross)


def _roots(values: np.ndarray) -> np.ndarray:
    """Of the eigenvalues of a symmetric matrix without negative ones, up to rounding."""
    rounding = len(values) * np.finfo(np.float64).eps * values.max(initial=0)
    return np.sqrt(np.where(values > rounding, values, 0))


def frechet_distance(a: np.ndarray, b: np.ndarray, ridge: float = 1e-3) -> float:
    """The Frechet distance of two sets [N, D], with ridge I added to both covariances."""

    def fitted(x: np.ndarray) -> Gaussian:
        x = np.asarray(x, np.float64)
        return Gaussian(x.mean(0), np.cov(x, rowvar=False) + ridge * np.eye(x.shape[1]))

    return frechet(fitted(a), fitted(b))
