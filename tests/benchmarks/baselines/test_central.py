"""The central difference: exact of a parabola, SoFlow's own quotient as the ends draw together."""

import pytest
import torch

from benchmarks.baselines.central import CENTRAL, consistency, quotient, slope
from benchmarks.correctness.comparison import count_calls
from benchmarks.harness.cases import random_batch
from benchmarks.harness.recipes import build
from soflow_fast.config.schema import override
from soflow_fast.flow import SolutionFlow, per_sample
from soflow_fast.training.step import draw
from tests.benchmarks.tiny import CONFIG

UNGUIDED = override(CONFIG, {"objective.guidance_scale": 1.0, "objective.label_drop": 0.0})


class Parabola(torch.nn.Module):
    """N = 3 x + t^2 - s, whose derivative along a velocity v is 3 v + 2 t."""

    num_classes = 0

    def forward(self, x, t, s, y):
        return 3 * x + per_sample(t**2 - s, x)


def test_it_is_exact_of_a_parabola():
    flow = SolutionFlow(Parabola())
    t = torch.tensor([0.4, 0.8], dtype=torch.float64)
    x, v = torch.ones(2, 1, 1, 1).double(), torch.full((2, 1, 1, 1), 2.0).double()
    found = slope(flow, x, v, t, t / 2, torch.tensor([0.3, 0.01]).double(), None)
    assert torch.allclose(found.flatten(), 6 + 2 * t)
    late = torch.tensor([0.99, 0.99], dtype=torch.float64)  # the later end stays at 1
    q = quotient(flow, x, v, (late, late - 0.3, late / 2), None)
    assert torch.allclose(q.flatten(), 2 - late / 2 * (6 + 2 * late))


def test_it_is_soflow_as_the_ends_draw_together():
    """The gradient, too: the difference falls with the distance."""
    state = build(CENTRAL, UNGUIDED)
    x0, y = random_batch(state.config, state.device)
    flow, objective, draws = state.flow.double(), state.objective, draw(state, x0.shape)
    x0, x1 = x0.double(), draws.x1.double()
    t = draws.t.double().clamp(0.2, 0.9)
    s, dropped = t / 2, torch.zeros_like(draws.label_dropped)
    apart = []
    for r in (0.1, 0.01):
        l = t + r * (s - t)
        at = draws._replace(x1=x1, t=t, l=l, s=s)
        gradients = []
        for loss in (
            consistency(flow, objective, x0, at, y)[0],
            objective.consistency(flow, x0, x1, t, l, s, y, dropped).loss,
        ):
            parameters = [p for p in flow.parameters() if p.requires_grad]
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            gradients.append(torch.cat([g.flatten() for g in found if g is not None]))
        apart.append(float((gradients[0] - gradients[1]).norm() / gradients[1].norm()))
    assert 0 < apart[1] < 0.2 * apart[0]


def test_it_trains_in_four_calls():
    state = build(CENTRAL, UNGUIDED)
    calls, metrics = count_calls(CENTRAL, state, *random_batch(state.config, state.device))
    assert calls == CENTRAL.network_calls(state.objective) == 4
    assert all(value.isfinite() for value in metrics.values()) and state.step == 1


def test_guidance_is_refused():
    state = build(CENTRAL, CONFIG)
    with pytest.raises(ValueError, match="without guidance"):
        CENTRAL.step(state, *random_batch(CONFIG, state.device))
