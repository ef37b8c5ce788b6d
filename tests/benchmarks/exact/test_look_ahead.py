"""The bias of a finite look-ahead: exact where it is known, and of the order that it has."""

import itertools

import pytest
import torch

from benchmarks.exact import look_ahead
from benchmarks.exact.mixture import Mixture, ring
from soflow_fast.config.schema import ObjectiveConfig
from soflow_fast.objective import Objective

F64 = torch.float64


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_gaussian() -> Mixture:
    means, deviations = torch.tensor([[1.0, -2.0]], dtype=F64), torch.tensor([[0.5, 0.2]], dtype=F64)
    return Mixture(torch.ones(1, dtype=F64), means, deviations)


def noise(n: int) -> torch.Tensor:
    return torch.randn(n, 2, generator=source(), dtype=F64)


def points(n: int, t: float, s: float) -> tuple[torch.Tensor, ...]:
    return noise(n), torch.full((n,), t, dtype=F64), torch.full((n,), s, dtype=F64)


def test_of_one_gaussian_draws_change_nothing():
    """f is linear in x, so the mean velocity stands for the drawn one: in the quotient up to the differencing of J,
    1e-4 squared; in the chain, whose slopes differ from the exact ones by a part of r, within five standard errors."""
    at, draws = points(5, 1.0, 0.2), 400
    biases = [look_ahead.quotient_bias(one_gaussian(), *at, 0.1, n, source()) for n in (0, 1)]
    torch.testing.assert_close(*biases, rtol=0, atol=1e-6)
    drawn = look_ahead.drawn_fixed_point(one_gaussian(), noise(5), 1.0, 0.2, 0.1, draws, source())
    error = drawn.std(0) / draws**0.5
    along_mean = look_ahead.fixed_point(one_gaussian(), noise(5), 1.0, 0.2, 0.1)
    assert ((drawn.mean(0) - along_mean).abs() < 5 * error).all()
    assert error.max() < 1e-3


def test_the_quotient_is_the_mean_over_pairs():
    """Of an f that is not linear, between two Gaussians of unequal weight: along the line of each pair, whose point at
    l is (1 - l) x_0 + l x_1. Within five standard errors; the mean velocity's is not within ten."""
    weights, means = torch.tensor([0.7, 0.3], dtype=F64), torch.tensor([[-1.0], [1.0]], dtype=F64)
    mixture, n, r = Mixture(weights, means, torch.full((2, 1), 0.3, dtype=F64)), 600, 0.4
    x, t, s = torch.tensor([[-0.2], [0.5]], dtype=F64).repeat(n, 1), *points(2 * n, 0.8, 0.0)[1:]
    l = t + r * (s - t)
    x0, x1 = mixture.pair(x, t, source(1))
    x_l = (1 - l)[:, None] * x0 + l[:, None] * x1
    pairs = (mixture.solution(x, t, s) - mixture.solution(x_l, l, s)) / (t - l)[:, None]
    found = [look_ahead.quotient_bias(mixture, x, t, s, r, draws, source(2)) for draws in (2, 0)]
    drawn, straight, pairs = (value.reshape(n, 2) for value in (*found, pairs))
    error = ((pairs.var(0) + drawn.var(0)) / n).sqrt()
    assert ((drawn.mean(0) - pairs.mean(0)).abs() < 5 * error).all()
    assert ((straight[0] - pairs.mean(0)).abs() > 10 * error).all()


def test_subtracting_the_first_order_changes_no_mean():
    """The ends of a chain with nothing subtracted have the same mean, within five standard errors."""
    at, draws = (ring(), noise(3), 1.0, 0.3, 0.3), 1000
    with_it = look_ahead.drawn_fixed_point(*at, draws, source(1))
    without = look_ahead.drawn_fixed_point(*at, draws, source(2), subtract=False)
    error = ((with_it.var(0) + without.var(0)) / draws).sqrt()
    assert ((with_it.mean(0) - without.mean(0)).abs() < 5 * error).all()
    assert (with_it.var(0) < 0.5 * without.var(0)).all()


def test_the_slopes_are_those_of_the_exact_solution():
    """At the points of the exact path J d is what a short step d changes, up to the third order. Few steps of the
    solver along the path change the slopes by less than 1e-6; where J is steeper than 2 it is shortened to that."""
    (x, t, _), s, r = points(12, 1.0, 0.3), 0.3, 0.3
    times = look_ahead.chain(1.0, s, r)
    found = look_ahead.path_slopes(ring(), x, 1.0, s, r)
    assert len(found) == len(times) - 1
    d = torch.tensor([2e-3, 1e-3], dtype=F64)
    for now, slope in list(zip(times[1:], found, strict=True))[:2]:
        at = ring().solution(x, t, torch.full_like(t, now))
        begin, end = torch.full_like(t, now), torch.full_like(t, s)
        change = (ring().solution(at + d, begin, end) - ring().solution(at - d, begin, end)) / 2
        whole = look_ahead.jacobian(ring(), at, begin, end)
        torch.testing.assert_close((whole @ d[:, None])[..., 0], change, rtol=0, atol=1e-5)
        torch.testing.assert_close(slope, look_ahead.shortened(whole), rtol=0, atol=1e-5)
        norms = torch.linalg.matrix_norm(whole)
        assert norms.max() > look_ahead.STEEPEST > norms.min()
        steep = torch.linalg.matrix_norm(slope)[norms > look_ahead.STEEPEST]
        torch.testing.assert_close(steep, torch.full_like(steep, look_ahead.STEEPEST))


@pytest.mark.parametrize("together", [6, 2])
def test_draws_are_as_many_as_asked_for(together, monkeypatch):
    """Drawn a few at a time, also where that does not come out even, and one by one where points are more than that."""
    monkeypatch.setattr(look_ahead, "TOGETHER", together)
    found = look_ahead.drawn_fixed_point(ring(), noise(3), 1.0, 0.0, 0.5, 5, source())
    assert found.shape == (5, 3, 2) and len(found.unique(dim=0)) == 5


def test_in_one_step_f_is_the_mean_of_the_data():
    """r = 1 draws a pair once: E[x_0 | x_1 = x], as flow matching's velocity says it."""
    x, one = noise(20), torch.ones(20, dtype=F64)
    wanted = x - ring().velocity(x, one)
    torch.testing.assert_close(look_ahead.fixed_point(ring(), x, 1.0, 0.0, 1.0), wanted)
    drawn = look_ahead.drawn_fixed_point(ring(), x, 1.0, 0.0, 1.0, 4000, source(1), subtract=False)
    # A mean of 4000 ends that lie at most about 2.5 from the middle.
    assert (drawn.mean(0) - wanted).norm(dim=1).max() < 5 * 2.5 / 4000**0.5


@pytest.mark.parametrize("of", ["solution", "quotient"])
def test_the_bias_is_of_first_order(of):
    """A tenth of r has a tenth of the bias, up to the next order, which is r itself: 10 %."""
    at = points(20, 1.0, 0.5)
    exact = ring().solution(*at, steps=256)
    found = []
    for r in (0.1, 0.01):
        if of == "solution":
            bias = look_ahead.fixed_point(ring(), noise(20), 1.0, 0.5, r) - exact
        else:
            bias = look_ahead.quotient_bias(ring(), *at, r)
        found.append(bias.norm(dim=1).mean().item())
    assert found[0] / found[1] == pytest.approx(10, rel=0.1)


def test_the_fixed_point_is_one():
    """f_r(x, t, s) = f_r(x_l, l, s) along mean velocities, up to what is left of the chain at its end."""
    (x, t, _), r = points(4, 1.0, 0.0), 0.1
    x_l = x - r * ring().velocity(x, t)
    here, there = (look_ahead.fixed_point(ring(), *at, 0.0, r) for at in ((x, 1.0), (x_l, 1.0 - r)))
    torch.testing.assert_close(here, there, rtol=0, atol=look_ahead.NEAR)


def test_weights_move_the_velocity():
    """p = 0 is the mean of draws, within five standard errors; p = 1 leaves it for the heavier of two far ones."""
    x, t, _ = points(4, 0.9, 0.0)
    found, mean = look_ahead.weighted_velocity(ring(), x, t, 0.0, 0.01, 4000, source())
    assert torch.equal(found, mean) and ((found - ring().velocity(x, t)).abs() < 5 * 2.5 / 4000**0.5).all()
    two = Mixture(
        torch.tensor([0.7, 0.3], dtype=F64),
        torch.tensor([[-5.0], [5.0]], dtype=F64),
        torch.full((2, 1), 0.1, dtype=F64),
    )
    x, t = torch.zeros(1, 1, dtype=F64), torch.ones(1, dtype=F64)
    heavier, _ = look_ahead.weighted_velocity(two, x, t, 1.0, 0.01, 1000, source())
    assert two.velocity(x, t).item() == pytest.approx(2.0) and heavier.item() == pytest.approx(5.0, abs=0.3)


def test_the_weighted_velocity_is_where_its_gradient_vanishes():
    x, t = noise(8), torch.full((8,), 0.7, dtype=F64)
    before, after = (look_ahead.weighted_velocity(ring(), x, t, 0.5, 0.01, 200, source(), n) for n in (400, 401))
    assert torch.allclose(before[0], after[0], atol=1e-6) and (after[0] - after[1]).norm(dim=1).max() > 0.1
    for p, eps in ((0.5, 0.01), (1.0, 0.3)):
        found, _ = look_ahead.weighted_velocity(ring(), x, t, p, eps, 200, source())
        v = look_ahead.drawn_velocity(ring(), x.repeat(200, 1), t.repeat(200), source()).reshape(200, 8, 2)
        w = 1 / ((v - found).square().mean(2, keepdim=True) + eps) ** p
        assert (w * (v - found)).mean(0).abs().max() < 1e-6 * w.mean()
    # Given x the velocity of one Gaussian is a Gaussian: the weights are symmetric about its mean.
    found, mean = look_ahead.weighted_velocity(one_gaussian(), x, t, 1.0, 0.01, 4000, source())
    assert (found - mean).norm() < 0.1 * one_gaussian().velocity(x, t).norm()


def test_the_chain_has_the_times_of_the_engine():
    """And ends near s. For r = 0.003 the shortest look-ahead of the engine, 1e-4, is in force before that."""
    for t, s in ((1.0, 0.0), (0.9, 0.4)):
        for r in (0.3, 0.01, 0.003, 1.0):
            times = look_ahead.chain(t, s, r)
            objective = Objective(ObjectiveConfig(r_schedule="constant", r_end=r))
            for now, after in itertools.pairwise(times):
                assert now - s > look_ahead.NEAR * (t - s)
                wanted = objective.middle_time(torch.tensor(now, dtype=F64), torch.tensor(s, dtype=F64), 0, 1)
                assert after == pytest.approx(max(wanted.item(), s), abs=1e-12)
            assert times[0] == t and s <= times[-1] <= s + look_ahead.NEAR * (t - s)
