"""benchmarks/exact/mixture.py: velocity and solution of a mixture of Gaussians."""

import math

import pytest
import torch

from benchmarks.exact.mixture import Mixture, ring, scattered


def times(n: int, value: float) -> torch.Tensor:
    return torch.full((n,), value, dtype=torch.float64)


def one_gaussian(path: str) -> Mixture:
    mean = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    return Mixture(torch.ones(1, dtype=torch.float64), mean, torch.tensor([[0.5, 2.0]], dtype=torch.float64), path)


@pytest.mark.parametrize("path", ["linear", "trig"])
def test_a_gaussian_is_carried_along_its_quantiles(path: str):
    """The flow of one Gaussian is affine: (x - alpha m) / sqrt(alpha^2 d^2 + beta^2) stays what it is."""
    mixture, source = one_gaussian(path), torch.Generator().manual_seed(0)
    x = torch.randn(64, 2, generator=source, dtype=torch.float64)
    t, s = times(64, 0.9), times(64, 0.2)

    def moved(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alpha, beta, *_ = (value[:, None] for value in mixture.scales(t))
        return alpha * mixture.means, (alpha**2 * mixture.deviations**2 + beta**2).sqrt()

    (m_t, d_t), (m_s, d_s) = moved(t), moved(s)
    torch.testing.assert_close(mixture.solution(x, t, s), m_s + d_s * (x - m_t) / d_t, rtol=0, atol=1e-8)


@pytest.mark.parametrize("mixture", [ring(), ring(path="trig"), scattered()], ids=["ring", "trig", "scattered"])
def test_the_velocity_is_the_mean_of_the_pairs(mixture: Mixture):
    """At one point, over many pairs of data and noise that lie on it; each pair does lie on it."""
    n, source = 50_000, torch.Generator().manual_seed(1)
    t = times(n, 0.6)
    x = mixture.sample(1, source)[0].expand(n, -1) * 0.7 + 0.1
    x0, x1 = mixture.pair(x, t, source)
    alpha, beta, d_alpha, d_beta = (value[:, None] for value in mixture.scales(t))
    torch.testing.assert_close(alpha * x0 + beta * x1, x, rtol=0, atol=1e-12)
    v = d_alpha * x0 + d_beta * x1
    sigma = v.std(0) / math.sqrt(n)
    assert ((v.mean(0) - mixture.velocity(x[:1], t[:1])[0]).abs() < 5 * sigma).all()


@pytest.mark.parametrize("path", ["linear", "trig"])
def test_velocity_and_pairs_are_those_of_bayes(path: str):
    """Over data weighted by how likely each makes x_t = x, with no formula of a mixture: the mean velocity, the
    probabilities of the components, and how far drawn velocities scatter, within five standard errors. The components
    differ in weight and in width, so that each part of their probabilities counts."""
    weights = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    means = torch.tensor([[0.0, 0.5], [1.5, 0.0], [-1.0, -1.0]], dtype=torch.float64)
    widths = torch.tensor([[0.2, 0.3], [0.8, 0.5], [0.5, 1.2]], dtype=torch.float64)
    mixture, n = Mixture(weights, means, widths, path), 100_000
    x0, k = mixture.sample(n, torch.Generator().manual_seed(4))
    for time in (0.3, 0.6, 0.9):
        alpha, beta, d_alpha, d_beta = (value.item() for value in mixture.scales(times(1, time)))
        for x in torch.tensor([[0.4, 0.2], [-0.3, 0.6]], dtype=torch.float64):
            x1 = (x - alpha * x0) / beta
            w = torch.softmax(-0.5 * x1.square().sum(1), 0)
            v, is_k = d_alpha * x0 + d_beta * x1, torch.nn.functional.one_hot(k, 3).double()
            pairs = mixture.pair(x.expand(n, -1), times(n, time), torch.Generator().manual_seed(5))
            drawn = (d_alpha * pairs[0] + d_beta * pairs[1]).square()
            for each, found, noise in (
                (v, mixture.velocity(x[None], times(1, time))[0], 0),
                (is_k, mixture.responsibilities(x[None], times(1, time))[0], 0),
                (v.square(), drawn.mean(0), drawn.std(0) / n**0.5),
            ):
                mean = (w[:, None] * each).sum(0)
                error = (w[:, None] * (each - mean)).square().sum(0).sqrt() + noise
                assert ((found - mean).abs() < 5 * error + 1e-12).all()
                assert (error < 0.05 * (1 + mean)).all()


@pytest.mark.parametrize("mixture", [ring(), scattered()], ids=["ring", "scattered"])
def test_solutions_are_consistent_and_carry_noise_to_data(mixture: Mixture):
    n, source = 1000, torch.Generator().manual_seed(2)
    x = torch.randn(n, mixture.means.shape[1], generator=source, dtype=torch.float64)
    one, half, zero = times(n, 1), times(n, 0.5), times(n, 0)
    samples = mixture.solution(x, one, zero)
    by_way = mixture.solution(mixture.solution(x, one, half), half, zero)
    torch.testing.assert_close(samples, by_way, rtol=0, atol=1e-3)
    assert mixture.solution_error(x, one, zero) < 1e-3
    data, _ = mixture.sample(n, source)
    error = 5 * data.std(0) / math.sqrt(n)
    assert ((samples.mean(0) - data.mean(0)).abs() < 2**0.5 * error).all()
    assert ((samples.var(0) / data.var(0) - 1).abs() < 0.3).all()
    torch.testing.assert_close(mixture.solution(x, one, one), x, rtol=0, atol=0)


def test_the_component_may_be_given():
    mixture, source = ring(), torch.Generator().manual_seed(3)
    x, k = mixture.sample(256, source)
    x1 = torch.randn(x.shape, generator=source, dtype=torch.float64)
    t = times(256, 0.7)
    x_t = 0.3 * x + 0.7 * x1
    each = [mixture.velocity(x_t, t, torch.full_like(k, i)) for i in range(8)]
    weighted = sum(p[:, None] * v for p, v in zip(mixture.responsibilities(x_t, t).T, each, strict=True))
    torch.testing.assert_close(weighted, mixture.velocity(x_t, t))
    ends = mixture.solution(x1, times(256, 1), times(256, 0), k)
    assert ((ends - mixture.means[k]).norm(dim=1) < 1.5).all()


def test_what_is_no_mixture_is_refused():
    good = ring()
    for weights, means, deviations in (
        (good.weights[:3], good.means, good.deviations),
        (good.weights * 2, good.means, good.deviations),
        (good.weights, good.means, 0 * good.deviations),
        (good.weights, good.means.float(), good.deviations),
    ):
        with pytest.raises(ValueError, match="must be"):
            Mixture(weights, means, deviations)


def test_the_solvers_error_is_the_largest():
    """Of two points, one of which does not move."""
    x, t, s = torch.full((2, 2), 0.5, dtype=torch.float64), times(2, 1), torch.tensor([1.0, 0.0], dtype=torch.float64)
    moved = (ring().solution(x, t, s, steps=2) - ring().solution(x, t, s, steps=4))[1].norm().item()
    assert ring().solution_error(x, t, s, steps=2) == pytest.approx(moved) and moved > 1e-3


def test_the_shapes_of_the_mixtures():
    mixture = ring(4, radius=3.0, deviation=0.1)
    corners = torch.tensor([[3, 0], [0, 3], [-3, 0], [0, -3]], dtype=torch.float64)
    torch.testing.assert_close(mixture.means, corners, rtol=0, atol=1e-12)
    assert (mixture.deviations == 0.1).all() and (mixture.weights == 0.25).all()
    torch.testing.assert_close(scattered(5, spread=2.0).means, 2 * scattered(5).means)
    assert scattered().means.shape == (8, 16) and scattered().deviations.unique().numel() == 8 * 16
