"""Paths, coefficients and the identities that the solution function must satisfy."""

import math

import pytest
import torch
from torch import nn

from soflow_fast import SolutionFlow

KINDS = [(path, coefficients) for path in ("linear", "trig") for coefficients in ("euler", "trig")]


class Smooth(nn.Module):
    """A cheap smooth network with the DiT's signature."""

    num_classes = 3

    def forward(self, x, t, s, y=None):
        t, s = (v[:, None, None, None] for v in (t, s))
        return (
            torch.sin(1.3 * x + t) * (1 + 0.5 * s) + 0.2 * x.roll(1, 3) + (0 if y is None else y[:, None, None, None])
        )


@pytest.fixture
def times():
    t = torch.tensor([0.9, 0.5, 0.31, 1.0], dtype=torch.float64)
    return t, t * torch.tensor([0.5, 0.99, 0.0, 0.3], dtype=torch.float64)


@pytest.mark.parametrize("path,coefficients", KINDS)
def test_solution_at_its_own_time_is_the_point(path, coefficients, times):
    flow, x = SolutionFlow(Smooth(), path, coefficients), torch.randn(4, 2, 3, 3, dtype=torch.float64)
    assert torch.equal(flow.solution(x, times[0], times[0]), x)


@pytest.mark.parametrize("path", ["linear", "trig"])
def test_path_ends_and_velocity(path, times):
    flow = SolutionFlow(Smooth(), path)
    x0, x1 = torch.randn(2, 4, 2, 3, 3, dtype=torch.float64)
    zero, one = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(flow.point(x0, x1, zero)[0], x0)
    torch.testing.assert_close(flow.point(x0, x1, one)[0], x1)
    h = 1e-6
    t = times[0] - 0.01
    slope = (flow.point(x0, x1, t + h)[0] - flow.point(x0, x1, t - h)[0]) / (2 * h)
    torch.testing.assert_close(flow.point(x0, x1, t)[1], slope, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("coefficients", ["euler", "trig"])
def test_velocity_slope_is_the_derivative_of_the_solution_coefficients(coefficients):
    flow, t = SolutionFlow(Smooth(), "linear", coefficients), torch.tensor([0.2, 0.7], dtype=torch.float64)
    da, db = torch.func.jvp(lambda s: flow.solution_coefficients(t, s), (t,), (torch.ones_like(t),))[1]
    torch.testing.assert_close(da, torch.zeros_like(t))
    torch.testing.assert_close(db, torch.full_like(t, flow.velocity_slope))


def test_velocity_of_the_trigonometric_coefficients_has_the_positive_sign():
    flow, x = SolutionFlow(Smooth(), "trig", "trig"), torch.randn(2, 1, 2, 2)
    t = torch.tensor([0.3, 0.8])
    torch.testing.assert_close(flow.velocity(x, t), math.pi / 2 * flow.network(x, t, t))


@pytest.mark.parametrize("settings", [{"path": "straight"}, {"coefficients": "eulr"}])
def test_unknown_names_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        SolutionFlow(Smooth(), **settings)
