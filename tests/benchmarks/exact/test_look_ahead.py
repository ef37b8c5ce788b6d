"""The bias of a finite look-ahead: exact where it is known, and of the order that it has."""

import pytest
import torch

from benchmarks.exact import look_ahead
from benchmarks.exact.mixture import Mixture, ring

F64 = torch.float64


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_gaussian() -> Mixture:
    means, deviations = torch.tensor([[1.0, -2.0]], dtype=F64), torch.tensor([[0.5, 0.2]], dtype=F64)
    return Mixture(torch.ones(1, dtype=F64), means, deviations)


def points(n: int, t: float, s: float) -> tuple[torch.Tensor, ...]:
    x = torch.randn(n, 2, generator=source(), dtype=F64)
    return x, torch.full((n,), t, dtype=F64), torch.full((n,), s, dtype=F64)


def test_of_one_gaussian_draws_change_nothing():
    """f is linear in x, so the mean velocity stands for the drawn one: in the quotient up to the differencing of J,
    1e-4 squared; in the chain, whose slopes differ from the exact ones by a part of r, within five standard errors."""
    at, draws = points(5, 1.0, 0.2), 400
    biases = [look_ahead.quotient_bias(one_gaussian(), *at, 0.1, n, source()) for n in (0, 1)]
    torch.testing.assert_close(*biases, rtol=0, atol=1e-6)
    drawn = look_ahead.drawn_fixed_point(one_gaussian(), *at, 0.1, draws, source())
    error = drawn.std(0) / draws**0.5
    assert ((drawn.mean(0) - look_ahead.fixed_point(one_gaussian(), *at, 0.1)).abs() < 5 * error).all()
    assert error.max() < 1e-3


def test_subtracting_the_first_order_changes_no_mean(monkeypatch):
    """The ends of a chain with nothing subtracted have the same mean, within five standard errors."""
    at, draws = points(3, 1.0, 0.3), 1000
    with_it = look_ahead.drawn_fixed_point(ring(), *at, 0.3, draws, source(1))
    path_slopes = look_ahead.path_slopes
    monkeypatch.setattr(look_ahead, "path_slopes", lambda *given: [0 * slope for slope in path_slopes(*given)])
    without = look_ahead.drawn_fixed_point(ring(), *at, 0.3, draws, source(2))
    error = ((with_it.var(0) + without.var(0)) / draws).sqrt()
    assert ((with_it.mean(0) - without.mean(0)).abs() < 5 * error).all()
    assert (with_it.var(0) < 0.5 * without.var(0)).all()


@pytest.mark.parametrize("of", ["solution", "quotient"])
def test_the_bias_is_of_first_order(of):
    """A tenth of r has a tenth of the bias, up to the next order, which is r itself: 10 %."""
    at = points(20, 1.0, 0.5)
    exact = ring().solution(*at, steps=256)
    found = []
    for r in (0.1, 0.01):
        if of == "solution":
            bias = look_ahead.fixed_point(ring(), *at, r) - exact
        else:
            bias = look_ahead.quotient_bias(ring(), *at, r)
        found.append(bias.norm(dim=1).mean().item())
    assert found[0] / found[1] == pytest.approx(10, rel=0.1)


def test_the_fixed_point_is_one():
    """f_r(x, t, s) = f_r(x_l, l, s) along mean velocities, up to what is left of the chain at its end."""
    (x, t, s), r = points(4, 1.0, 0.0), 0.1
    l = t + r * (s - t)
    x_l = x + (l - t)[:, None] * ring().velocity(x, t)
    here, there = (look_ahead.fixed_point(ring(), *at, r) for at in ((x, t, s), (x_l, l, s)))
    torch.testing.assert_close(here, there, rtol=0, atol=look_ahead.NEAR)


def test_weights_move_the_velocity():
    """p = 0 is the mean of draws, within five standard errors; p = 1 leaves it for the heavier of two far ones."""
    x, t, _ = points(4, 0.9, 0.0)
    found = look_ahead.weighted_velocity(ring(), x, t, 0.0, 0.01, 4000, source())
    assert ((found - ring().velocity(x, t)).abs() < 5 * 2.5 / 4000**0.5).all()
    two = Mixture(
        torch.tensor([0.7, 0.3], dtype=F64),
        torch.tensor([[-5.0], [5.0]], dtype=F64),
        torch.full((2, 1), 0.1, dtype=F64),
    )
    x, t = torch.zeros(1, 1, dtype=F64), torch.ones(1, dtype=F64)
    heavier = look_ahead.weighted_velocity(two, x, t, 1.0, 0.01, 1000, source())
    assert two.velocity(x, t).item() == pytest.approx(2.0) and heavier.item() == pytest.approx(5.0, abs=0.3)


def test_the_chain_ends_near():
    for r in (0.3, 0.01, 1.0 - 1e-9):
        assert (1 - r) ** look_ahead.steps_of(r) <= look_ahead.NEAR < (1 - r) ** (look_ahead.steps_of(r) - 1)
