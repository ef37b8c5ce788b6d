"""Frechet distances against closed forms, and sums that lose nothing."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from soflow_fast.evaluation import Gaussian, GaussianSums, frechet, frechet_distance


def rotation(d: int, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))[0]


def commuting(d: int) -> tuple[Gaussian, Gaussian, float]:
    """Two Gaussians whose covariances have the same axes, and |m - n|^2 + sum (sqrt a - sqrt b)^2."""
    source, axes = np.random.default_rng(1), rotation(d)
    a, b = source.uniform(0.1, 4, d), source.uniform(0.1, 4, d)
    m, n = source.standard_normal((2, d))
    known = ((m - n) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    return Gaussian(m, (axes * a) @ axes.T), Gaussian(n, (axes * b) @ axes.T), known


@pytest.mark.parametrize("d", [1, 2, 64, 300])
def test_gaussians_with_the_same_axes_have_a_closed_form(d: int) -> None:
    a, b, known = commuting(d)
    # float64, of matrices with eigenvalues from 0.1 to 4: rounding of d terms.
    assert frechet(a, b) == pytest.approx(known, rel=1e-12, abs=1e-12 * d)
    assert frechet(b, a) == pytest.approx(known, rel=1e-12, abs=1e-12 * d)
    assert abs(frechet(a, a)) < 1e-12 * d


def test_gaussians_with_other_axes_agree_with_a_matrix_square_root() -> None:
    source = np.random.default_rng(2)
    x, y = (source.standard_normal((200, 12)) @ source.standard_normal((12, 12)) for _ in range(2))
    a, b = Gaussian.of(x), Gaussian.of(y)
    known = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance)
    known -= 2 * np.trace(np.real(sqrtm(a.covariance @ b.covariance)))
    assert frechet(a, b) == pytest.approx(known, rel=1e-9)


def test_two_dimensions_by_hand() -> None:
    """tr (A B)^(1/2) of 2 x 2 matrices is sqrt(tr(A B) + 2 sqrt(det A det B))."""
    A, B = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[1.0, -0.5], [-0.5, 4.0]])
    cross = np.sqrt(np.trace(A @ B) + 2 * np.sqrt(np.linalg.det(A) * np.linalg.det(B)))
    found = frechet(Gaussian(np.zeros(2), A), Gaussian(np.array([3.0, 4.0]), B))
    assert found == pytest.approx(25 + np.trace(A + B) - 2 * cross, rel=1e-13)


def test_singular_covariances_of_fewer_samples_than_dimensions() -> None:
    """On the axes of the first k coordinates alone, so that the distance is that of k dimensions."""
    d, k = 50, 5
    a, b, known = commuting(k)
    axes = rotation(d, 3)[:, :k]
    wide = [Gaussian(axes @ g.mean, axes @ g.covariance @ axes.T) for g in (a, b)]
    # With the roots of 45 eigenvalues that are rounding, 1e-16 times 4, it would be 1e-6 off.
    assert frechet(*wide) == pytest.approx(known, rel=1e-12)
    x = torch.randn(10, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert abs(frechet(Gaussian.of(x), Gaussian.of(x))) < 1e-11
    assert frechet(Gaussian.of(x), Gaussian.of(x + 2)) == pytest.approx(4 * d, rel=1e-12)
    assert frechet(Gaussian(np.zeros(d), np.zeros((d, d))), Gaussian.of(x)) == pytest.approx(
        (Gaussian.of(x).mean ** 2).sum() + np.trace(Gaussian.of(x).covariance), abs=1e-9
    )


def test_other_dimensions_and_numbers_that_are_not_finite_are_refused() -> None:
    a, b, _ = commuting(3)
    with pytest.raises(ValueError, match="3 and of 4 dimensions"):
        frechet(a, Gaussian(np.zeros(4), np.eye(4)))
    with pytest.raises(ValueError, match="is not finite"):
        frechet(a, Gaussian(b.mean, b.covariance * np.nan))


def test_sums_in_batches_are_those_of_numpy_however_large_the_mean_is() -> None:
    source = torch.Generator().manual_seed(0)
    x = torch.randn(500, 6, generator=source) + torch.tensor([0, 1, 1e2, 1e3, 1e4, -1e4])
    sums = GaussianSums()
    for part in x.split([1, 3, 96, 200, 200]):
        sums.add(part)
    sums.add(x[:0])
    found, exact = sums.gaussian(), x.double().numpy()
    assert sums.count == 500 and found.mean.dtype == found.covariance.dtype == np.float64
    np.testing.assert_allclose(found.mean, exact.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.covariance, np.cov(exact, rowvar=False), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        Gaussian.of(x[:1])
    with pytest.raises(ValueError, match="at least 2 samples, got 0"):
        GaussianSums().gaussian()


def test_the_ridge_is_added_to_both() -> None:
    x = np.random.default_rng(0).standard_normal((40, 5))
    still = np.repeat(x[:1], 40, 0)
    expected = ((x.mean(0) - x[0]) ** 2).sum() + np.trace(np.cov(x, rowvar=False)) + 2 * 5 * 0.5
    values = np.linalg.eigvalsh(np.cov(x, rowvar=False)) + 0.5
    expected -= 2 * np.sqrt(values * 0.5).sum()
    assert frechet_distance(x, still, ridge=0.5) == pytest.approx(expected, rel=1e-12)
