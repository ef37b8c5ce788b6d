"""Images of the cosine basis: the basis is a rotation, the bands share it out, the mixture is as its docstring says."""

from dataclasses import replace

import pytest
import torch

from benchmarks.exact import images


@pytest.mark.parametrize("side", [1, 8, 32])
def test_the_basis_is_orthonormal(side):
    basis = images.cosines(side)
    torch.testing.assert_close(basis @ basis.T, torch.eye(side, dtype=torch.float64), rtol=0, atol=1e-12)
    z = torch.randn(3, side**2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = images.to_images(z, side)
    assert x.shape == (3, 1, side, side)
    torch.testing.assert_close(images.to_coefficients(x), z, rtol=0, atol=1e-12)
    torch.testing.assert_close(x.flatten(1).norm(dim=1), z.norm(dim=1))


def test_a_smooth_image_has_coarse_coefficients():
    ramp = torch.linspace(-1, 1, 32, dtype=torch.float64).expand(1, 1, 32, 32)
    z = images.to_coefficients(ramp)[0]
    coarse, fine = images.bands(32)[0], images.bands(32)[-1]
    assert z[coarse].norm() > 0.99 * z.norm() and z[fine].norm() < 0.01 * z.norm()


@pytest.mark.parametrize(("side", "count"), [(2, 1), (8, 3), (32, 5)])
def test_each_coefficient_is_in_one_band(side, count):
    found = torch.stack(images.bands(side))
    assert len(found) == count and (found.sum(0) == 1).all()


def test_the_mixture_is_as_described():
    mixture = images.photographs()
    for deviations, means, power in zip(mixture.deviations, mixture.means, images.EXPONENTS, strict=True):
        assert deviations.square().mean() == pytest.approx(images.VARIANCE)
        assert means.square().mean().sqrt() == pytest.approx(images.MEAN)
        assert means[images.frequencies(32) >= 4].abs().max() == 0
        r = images.frequencies(32)
        slope = (deviations[-1] / deviations[0]).log() / ((1 + r[-1]) / (1 + r[0])).log()
        assert slope == pytest.approx(-power)


def test_one_gaussian_has_the_mixtures_moments():
    mixture = images.photographs(4)
    single = images.one_gaussian(mixture)
    assert images.one_gaussian(replace(mixture, path="trig")).path == "trig" and single.path == "linear"
    z, _ = mixture.sample(100_000, torch.Generator().manual_seed(0))
    # Five standard errors of a mean, and of a variance whose fourth moment is at most that of a Gaussian here.
    assert ((z.mean(0) - single.means[0]).abs() < 5 * single.deviations[0] / 100_000**0.5).all()
    assert ((z.var(0) / single.deviations[0] ** 2 - 1).abs() < 5 * (2 / 100_000) ** 0.5).all()
