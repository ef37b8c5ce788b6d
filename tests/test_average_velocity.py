"""MeanFlow against the formulas of arXiv 2505.13447, its derivative against one of forward mode in float64."""

import copy
import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from soflow_fast import Objective, ObjectiveConfig, TrainState, preset
from soflow_fast.average_velocity import STEP, average_velocity_target, ordered_times
from soflow_fast.config.schema import DiTConfig
from soflow_fast.flow import per_sample
from soflow_fast.objective import ConsistencyPoints
from soflow_fast.training.consistency_target import ConsistencyTarget, value_and_increment

SMALL = DiTConfig(input_size=8, patch_size=2, in_channels=1, hidden_size=64, depth=3, num_heads=2, num_classes=10)
MEANFLOW = ObjectiveConfig(kind="meanflow", guidance_scale=1.0)


def build(objective=MEANFLOW, **changes):
    config = preset("digits", **{"precision": "fp32", "device": "cpu", "batch_size": 8, **changes})
    state = TrainState.build(dataclasses.replace(config, model=SMALL, objective=objective))
    with torch.no_grad():  # off the zero initialisation, where the network is constant
        for flow in (state.flow, state.teacher):
            for i, p in enumerate(flow.parameters() if flow else ()):
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return state


def points(objective, n=6):
    source = torch.Generator().manual_seed(3)
    x, v = torch.randn(2, n, 1, 8, 8, generator=source)
    t, s = objective.consistency_times(n, source)
    l = objective.middle_time(t, s, 0, 1)
    dx = v * per_sample(l - t, v)
    return ConsistencyPoints(x, v, dx, x + dx, t, l, s, torch.tensor([1, 5, 10, 0, 3, 3])[:n])


def exact(network, at):
    """u and du/dt along (v, 1) in float64, by forward-mode differentiation."""
    wide = copy.deepcopy(network).double()
    x, v, t, s = (value.double() for value in (at.x, at.target, at.t, at.s))
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        u, du = torch.func.jvp(lambda x, t: wide(x, t, s, at.y), (x, t), (v, torch.ones_like(t)))[:2]
    assert du.norm() > 0.1 * u.norm()  # a tangent that was lost would be zero
    return u, du


def relative(got, wanted):
    return float((got.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("kind", "precision", "bound"),
    [
        ("pair", "fp32", 5e-3),
        ("increments", "fp32", 2e-3),
        ("increments", "bf16", 1e-2),
    ],
)
def test_derivative_is_the_one_of_forward_mode(kind, precision, bound):
    """What is stated of each way; of increments in bf16 it is the rounding of their products."""
    state = build()
    at = points(state.objective)
    u, du = exact(state.flow.network, at)
    how = ConsistencyTarget(kind, precision, "student")
    value, increment = value_and_increment(how, state.flow, None, at, None)
    assert relative(state.objective.quotient(state.flow, at, value, increment), du) < bound
    assert relative(value, u) < bound


def test_derivative_of_an_average_is_the_averages():
    state = build(dataclasses.replace(MEANFLOW, teacher="ema"))
    with torch.no_grad():
        for p in state.teacher.parameters():
            p.mul_(0.9)
    at = points(state.objective)
    target = ConsistencyTarget("increments", "fp32", "ema")
    value, increment = value_and_increment(target, state.flow, state.teacher, at, None)
    assert (
        relative(state.objective.quotient(state.flow, at, value, increment), exact(state.teacher.network, at)[1]) < 2e-3
    )
    assert relative(value, exact(state.flow.network, at)[0]) < 1e-5


@pytest.mark.parametrize("p", [1.0, 0.5])
def test_loss_and_gradient_are_the_published_ones(p):
    """With du/dt of forward mode: |.|^2 is a sum over a sample, eps is beside it, and p other than 1 has a factor."""
    state = build(dataclasses.replace(MEANFLOW, p=p, eps=0.3))
    flow, objective = state.flow.double(), state.objective
    at = points(objective)
    at = at._replace(**{name: getattr(at, name).double() for name in ("x", "target", "dx", "x_l", "t", "l", "s")})
    u, du = exact(flow.network, at)
    output = u.clone().requires_grad_()
    term = objective.consistency_term(flow, output, at, u, du * per_sample(at.l - at.t, du))
    term.loss.backward()

    published = u.clone().requires_grad_()
    error = published - (at.target - per_sample(at.t - at.s, du) * du)
    square = error.square().flatten(1).sum(1)
    loss = (square / (square.detach() + 0.3) ** p).mean() * u[0].numel() ** (p - 1)
    loss.backward()
    torch.testing.assert_close(term.loss.double(), loss.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(output.grad, published.grad, rtol=1e-8, atol=1e-14)
    torch.testing.assert_close(term.mse.double(), square.detach().mean() / u[0].numel())


def test_target_of_a_known_average():
    """The path x_t = t^2, u(t, s) = t + s, v = 2 t: du/dt = 1, and u is v - (t - s) du/dt, whatever t and s."""
    t, s = torch.tensor([0.9, 0.5]).double(), torch.tensor([0.2, 0.5]).double()
    v, du = 2 * per_sample(t, torch.ones(2, 1, 1, 1).double()), torch.ones(2, 1, 1, 1).double()
    torch.testing.assert_close(average_velocity_target(v, t, s, du).flatten(), t + s)


def test_times_are_the_larger_and_the_smaller_of_two():
    objective = Objective(dataclasses.replace(MEANFLOW, mf_time=(-0.4, 1.0)))
    t, s = objective.consistency_times(40000, torch.Generator().manual_seed(0))
    equal = objective.flow_matching_times(40000, torch.Generator().manual_seed(1))
    assert (s <= t).all()
    # Of two independent standard normals the larger has mean 1 / sqrt(pi) and variance 1 - 1 / pi.
    for times, sign in ((t, 1), (s, -1), (equal, 1)):
        logit = torch.logit(times.double())
        assert abs(logit.mean() - (-0.4 + sign * 0.5642)) < 0.02 and abs(logit.var() - (1 - 0.3183)) < 0.02
    assert torch.equal(equal, ordered_times(40000, (-0.4, 1.0), torch.Generator().manual_seed(1), torch.float32)[0])
    gap = t - objective.middle_time(t, s, 5, 10)
    assert (gap - STEP).abs().max() < 1e-7
