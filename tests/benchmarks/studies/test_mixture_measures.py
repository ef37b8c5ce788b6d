"""The measures of networks on mixtures: one that is exact has no error, one of a known error has that."""

import pytest
import torch

from benchmarks.exact.mixture import Mixture, ring
from benchmarks.studies.mixtures import measures, minimisers, problems
from soflow_fast.flow import SolutionFlow


class Exact(torch.nn.Module):
    """N of the exact solution and velocity."""

    num_classes = 0

    def __init__(self, data: Mixture) -> None:
        super().__init__()
        self.data, self.scale = data, torch.nn.Parameter(torch.ones(()))

    def forward(self, x, t, s, y):
        flat, t, s = x[:, :, 0, 0].double(), t.double(), s.double()
        if torch.equal(t, s):
            found = self.data.velocity(flat, t)
        else:
            found = (self.data.solution(flat, t, s, steps=64) - flat) / (s - t)[:, None]
        return self.scale * found[:, :, None, None].to(x.dtype)


def test_an_exact_network_has_no_error():
    at, flow = problems.held("ring", 40, 400), SolutionFlow(Exact(problems.mixture("ring")))
    assert all(value < 2e-3 for value in measures.errors(flow, at).values())
    rows = {(row["method"], row["calls"]): row for row in measures.by_calls(flow, at)}
    floor = measures.floor(problems.mixture("ring"), at, sets=4)
    for (method, _), row in rows.items():
        if method != "euler":
            assert row.get("error", 0) < 5e-3 and row["distance"] < 3 * floor
    assert rows["euler", 1]["error"] > rows["euler", 4]["error"] > rows["euler", 10]["error"] > 0.02
    assert rows["euler", 1]["distance"] > 5 * floor


class Shifted(Exact):
    """The exact N and a constant: f is off by (t - s) times its length, the velocity by its length."""

    constant = (0.3, 0.4)

    def forward(self, x, t, s, y):
        return super().forward(x, t, s, y) + torch.tensor(self.constant, dtype=x.dtype)[:, None, None]


def test_a_network_of_a_known_error_has_that():
    at, flow = problems.held("ring", 40, 400), SolutionFlow(Shifted(problems.mixture("ring")))
    found = measures.errors(flow, at)
    spread = (at.data - at.data.mean(0)).square().sum(1).mean().sqrt().item()
    interval = (at.within.t - at.within.s).square().mean().sqrt().item()
    assert found["one_step"] == pytest.approx(0.5 / spread, rel=1e-2)
    assert found["within"] == pytest.approx(0.5 * interval / spread, rel=1e-2)
    assert found["velocity"] == pytest.approx(0.5 / at.velocity.square().sum(1).mean().sqrt().item(), rel=1e-3)
    row = next(row for row in measures.by_calls(flow, at) if (row["method"], row["calls"]) == ("renoise", 1))
    assert row["error"] == pytest.approx(found["one_step"], rel=1e-3)
    directions = torch.randn(2, 10_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shift = (torch.tensor(Shifted.constant, dtype=torch.float64) @ (directions / directions.norm(dim=0))).abs().mean()
    assert row["distance"] == pytest.approx(shift.item() / spread, rel=0.35)  # 64 directions, and a floor below it


def test_the_distance_of_shifted_samples_is_the_shift():
    x = torch.randn(100, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert measures.sliced_distance(x, x + 0.3) == pytest.approx(0.3)
    assert measures.sliced_distance(x, x.flip(0)) == 0


def test_the_points_that_networks_are_judged_at():
    """Within the path: s below t and its share of t anywhere, x as far out as t says and made of data and noise of its
    own; all within five standard errors. The exact solutions are those of these points."""
    held = problems.held("ring", 200, 400)
    x, t, s, exact = held.within
    assert (s < t).all() and (s / t).mean() == pytest.approx(0.5, abs=5 * (1 / 12 / 200) ** 0.5)
    for product in (
        x.square().sum(1) - (1 - t) ** 2 * (4 + 2 * 0.04) - 2 * t**2,
        (x * held.data[:200]).sum(1),
        (x * held.noise[:200]).sum(1),
    ):
        assert product.mean().abs() < 5 * product.std() / 200**0.5
    torch.testing.assert_close(exact, ring().solution(x, t, s), rtol=0, atol=1e-9)
    assert torch.equal(held.one_step.x, held.noise[:200])
    torch.testing.assert_close(held.velocity, ring().velocity(x, t))
    other = problems.held("scattered", 4, 400)  # whose mean is not 0
    assert other.spread == pytest.approx(minimisers.spread(problems.mixture("scattered")), rel=0.03)
