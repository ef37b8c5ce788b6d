"""The average at one end of the target: its quotient diverges as l -> t, that of the engine's teacher does not."""

import pytest
import torch

from benchmarks.baselines.literal import LITERAL, consistency
from benchmarks.correctness.comparison import count_calls
from benchmarks.harness.cases import random_batch
from benchmarks.harness.recipes import build
from soflow_fast.config.schema import override
from soflow_fast.training.step import draw
from tests.benchmarks.tiny import CONFIG

WITH_TEACHER = override(
    CONFIG, {"objective.teacher": "ema", "objective.teacher_decay": 0.9, "objective.fm_fraction": 0.0}
)


@pytest.fixture
def state():
    """A state whose teacher is another network than its student."""
    state = build(LITERAL, WITH_TEACHER)
    with torch.no_grad():
        for parameter in state.teacher.parameters():
            parameter.mul_(0.5)
    return state


def test_its_quotient_diverges(state):
    """mean q^2 grows as 1 / (t - l)^2; with both ends from the average it is bounded."""
    x0, y = random_batch(state.config, state.device)
    draws = draw(state, x0.shape)
    literal, both = {}, {}
    for r in (0.01, 0.0001):
        at = draws._replace(l=draws.t + r * (draws.s - draws.t))
        with torch.no_grad():
            literal[r] = consistency(state.flow, state.objective, state.teacher, x0, at, y)[1].sqrt()
            given = (x0, at.x1, at.t, at.l, at.s, y, at.label_dropped)
            both[r] = state.objective.consistency(state.flow, *given, teacher=state.teacher).mse.sqrt()
    assert literal[0.0001] > 30 * literal[0.01]
    assert both[0.0001] < 2 * both[0.01]


def test_it_is_soflow_where_the_average_is_the_student():
    state = build(LITERAL, WITH_TEACHER)
    x0, y = random_batch(state.config, state.device)
    draws = draw(state, x0.shape)
    given = (x0, draws.x1, draws.t, draws.l, draws.s, y, draws.label_dropped)
    with torch.no_grad():
        found = consistency(state.flow, state.objective, state.teacher, x0, draws, y)
        wanted = state.objective.consistency(state.flow, *given, teacher=state.teacher)
    for a, b in zip(found, wanted, strict=True):
        assert float(a) == pytest.approx(float(b), rel=1e-5)


def test_it_trains_and_moves_its_average():
    config = override(WITH_TEACHER, {"objective.fm_fraction": 0.75})
    state = build(LITERAL, config)
    x0, y = random_batch(config, state.device)
    calls, metrics = count_calls(LITERAL, state, x0, y)
    assert calls == LITERAL.network_calls(state.objective) == 5
    assert all(value.isfinite() for value in metrics.values()) and state.step == 1
    before = [p.clone() for p in state.teacher.parameters()]
    LITERAL.step(state, x0, y)
    assert any(not torch.equal(p, q) for p, q in zip(before, state.teacher.parameters(), strict=True))


def test_without_a_teacher_it_refuses():
    state = build(LITERAL, CONFIG)
    with pytest.raises(ValueError, match="teacher must be 'ema'"):
        LITERAL.step(state, *random_batch(CONFIG, state.device))
