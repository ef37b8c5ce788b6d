"""What the losses on mixtures tend to: known distances are found, in the units that are said."""

import pytest
import torch

from benchmarks.exact import look_ahead
from benchmarks.exact.estimates import root_mean_square
from benchmarks.exact.mixture import Mixture, ring
from benchmarks.studies.mixtures import measures, minimisers, problems


def one_gaussian() -> Mixture:
    mean = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    return Mixture(torch.ones(1, dtype=torch.float64), mean, torch.tensor([[0.5, 2.0]], dtype=torch.float64))


def test_the_bias_of_wide_gaussians_is_of_first_order():
    """Eightfold r, about eightfold distance, of the deterministic recursion; pairs add to it."""
    rows = minimisers.biases(minimisers.WIDE, points=600, rates=(0.16, 0.02))
    marginal = rows[0]["marginal"] / rows[1]["marginal"]
    assert 6 < marginal < 11
    assert rows[0]["pair"] > 1.2 * rows[0]["marginal"] and rows[0]["pair"] > rows[1]["pair"]


def test_weighted_velocities_say_what_is_not_known():
    """More draws leave less unknown; decided points are hardly moved."""
    few, many = (minimisers.weighted(points=60, pairs=pairs, sizes=())[-1] for pairs in (50, 800))
    assert many["unknown"] < 0.5 * few["unknown"] and many["unknown"] < 0.1 * many["velocity"]
    assert 0 < many["undecided"] < 1 and many["velocity_undecided"] > many["velocity"]


def test_weighted_velocities_are_in_units_of_the_exact_one(one_thread, monkeypatch):
    """Moved by three times the exact one where it is undecided and nowhere else, from a mean that is off by one of it;
    at points of the path, which lie as far out as their times say, within five standard errors."""
    parts, out = [], []

    def weighted_velocity(data, x, t, p, eps, draws, source):
        exact, undecided = data.velocity(x, t), data.responsibilities(x, t).amax(1) <= 0.99
        length = exact.square().sum(1)
        parts.append((undecided.double().mean().item(), (length[undecided].sum() / length.sum()).sqrt().item()))
        out.append(x.square().sum(1) - (1 - t) ** 2 * (4 + 2 * 0.04) - 2 * t**2)
        return (2 + 3 * undecided[:, None]) * exact, 2 * exact

    monkeypatch.setattr(minimisers, "weighted_velocity", weighted_velocity)
    for row, (share, length) in zip(minimisers.weighted(points=400, pairs=2, sizes=()), parts, strict=True):
        assert row["undecided"] == pytest.approx(share) and 0.1 < share < 0.9
        assert row["unknown"] == pytest.approx(1) and row["velocity_undecided"] == pytest.approx(3)
        assert row["velocity"] == pytest.approx(3 * length)
    assert out[0].mean().abs() < 5 * out[0].std() / 400**0.5


def test_the_standard_error_of_a_bias_is_that_of_other_noises():
    """Of both ways, over disjoint sets of noises."""
    held = problems.held("ring", 600, 600).one_step
    data, found = ring(), []
    for k in range(0, 600, 25):
        noise, exact = held.x[k : k + 25], held.exact[k : k + 25]
        a, b = minimisers.means(data, noise, 0.3, torch.Generator().manual_seed(k))
        straight = look_ahead.fixed_point(data, noise, 1.0, 0.0, 0.3) - exact
        found.append((root_mean_square(a - exact, b - exact), root_mean_square(straight)))
    for way in zip(*found, strict=True):
        roots, errors = torch.tensor(way).T
        assert roots.std() == pytest.approx(errors.mean().item(), rel=0.5)


def test_biases_are_of_the_held_noises(monkeypatch):
    """f_r put a known distance away is that far, in units of the spread, as is its error; of two means the product
    counts."""
    at = problems.held("ring", 40, 400)
    monkeypatch.setattr(minimisers, "held", lambda name: at)
    shift = torch.linspace(0.5, 1.5, 20, dtype=torch.float64)[:, None] * torch.tensor([0.3, 0.4], dtype=torch.float64)
    exact = at.one_step.exact[:20]
    monkeypatch.setattr(minimisers, "means", lambda data, noise, *rest: (exact + shift, exact + 4 * shift))
    monkeypatch.setattr(minimisers, "fixed_point", lambda *given: exact - 3 * shift)
    (row,) = minimisers.biases("ring", points=20, rates=(0.1,))
    for way, ends in {"pair": (shift, 4 * shift), "marginal": (-3 * shift,)}.items():
        found, error = root_mean_square(*ends)
        assert row[way] == pytest.approx(found / at.spread)
        assert row[f"{way}_standard_error"] == pytest.approx(error / at.spread) and error > 0.01
    assert row["points"] == 20 and row["chains"] == minimisers.chains(0.1) == 10


def test_the_unit_of_distances_is_the_datas_spread():
    """Of one Gaussian the root of its variances' sum; of two points that of the distance between them as well. A floor
    is in that unit."""
    assert minimisers.spread(one_gaussian()) == pytest.approx((0.5**2 + 2.0**2) ** 0.5)
    weights, means = torch.tensor([0.75, 0.25], dtype=torch.float64), torch.tensor([[1.0], [5.0]], dtype=torch.float64)
    two = Mixture(weights, means, torch.tensor([[0.1], [0.3]], dtype=torch.float64))
    assert minimisers.spread(two) == pytest.approx((3.0 + 0.75 * 0.01 + 0.25 * 0.09) ** 0.5)
    held = problems.held("ring", 40, 400)
    assert held.spread == pytest.approx(minimisers.spread(ring()), rel=0.03)  # 400 points, all about as far out
    shifted = held._replace(data=held.data + 1, spread=held.spread / 2)
    floor, moved = (measures.floor(ring(), at, sets=2) for at in (held, held._replace(spread=held.spread / 2)))
    assert moved == pytest.approx(2 * floor) and measures.floor(ring(), shifted, sets=2) > 2 * floor
