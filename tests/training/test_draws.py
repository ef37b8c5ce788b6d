"""Draws from outside: what is given is what the step takes."""

import pytest
import torch

from soflow_fast import Draws, draw, train_step
from soflow_fast.training._draws import own_n_fm
from tests.states import build


def batch():
    source = torch.Generator().manual_seed(5)
    return torch.rand(4, 1, 8, 8, generator=source) * 2 - 1, torch.arange(4)


def test_a_draw_changes_nothing_and_is_what_a_step_takes():
    state, other = build(), build()
    x0, y = batch()
    first, again = draw(state, list(x0.shape)), draw(state, x0.shape)
    assert all(torch.equal(a, b) for a, b in zip(first[:5], again[:5], strict=True)) and first.n_fm == again.n_fm == 2
    given, own = train_step(state, x0, y, draws=first), train_step(other, x0, y)
    assert given.keys() == own.keys() and all(torch.equal(given[name], own[name]) for name in given)
    assert not torch.equal(draw(state, x0.shape).x1, first.x1)


def test_the_step_takes_what_is_given():
    """Another split, times and noise in float64 on their way: all of it reaches the samples."""
    state = build()
    x0, y = batch()
    t, l, s = torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([0.9, 0.5, 0.4, 0.3]), torch.tensor([0.9, 0.2, 0.1, 0.0])
    dropped = torch.tensor([False, True, False, True])
    mine = Draws(torch.full_like(x0, 0.5), t, l, s, dropped, 1)
    told = {}
    train_step(state, x0, y, draws=mine, observe=lambda name, **values: told.setdefault(name, values))
    samples = told["student"]["samples"]
    assert samples.n_fm == 1 and torch.equal(samples.t, t) and torch.equal(samples.l, l) and torch.equal(samples.s, s)
    assert samples.y.tolist() == [0, 10, 2, 10]
    assert torch.allclose(samples.v_t, 0.5 - x0) and len(told["target"]["value"]) == 3


def test_a_recorded_step_is_not_taken_for_another_split():
    state = build()
    x0, y = batch()
    state.graph = lambda *given: pytest.fail("the recording splits the batch otherwise")
    drawn = draw(state, x0.shape)
    assert drawn.n_fm == own_n_fm(state, 4) == 2
    metrics = train_step(state, x0, y, draws=drawn._replace(n_fm=4, l=drawn.t, s=drawn.t))
    assert metrics["fm_loss"].isfinite() and "sc_loss" not in metrics and state.step == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"x1": torch.zeros(4, 1, 8, 7)},
            r"draws\.x1 must be floating \[4, 1, 8, 8\], got torch.float32",
        ),
        ({"s": torch.zeros(3)}, r"draws\.s must be floating \[4\], got torch.float32 \[3\]"),
        ({"l": torch.zeros(4, dtype=torch.int64)}, r"draws\.l must be floating \[4\], got torch.int64"),
        ({"label_dropped": torch.zeros(4)}, r"draws\.label_dropped must be bool \[4\], got torch.float32"),
        ({"w": torch.ones(4)}, r"draws\.w: the network sees no guidance scale"),
        ({"w": torch.ones(4)}, r"draws\.w: the network sees no guidance scale"),
        ({"n_fm": 5}, r"draws\.n_fm must be a whole number from 0 to 4, got 5"),
        ({"n_fm": 2.0}, r"draws\.n_fm must be a whole number"),
        ({"n_fm": True}, r"draws\.n_fm must be a whole number"),
        ({"n_fm": 0}, r"draws\.l must be below draws\.t for consistency samples"),
        ({"l": None}, r"draws\.l must be a tensor, got NoneType"),
    ],
)
def test_draws_that_do_not_fit(changes, message):
    state = build()
    x0, y = batch()
    with pytest.raises(ValueError, match=message):
        train_step(state, x0, y, draws=draw(state, x0.shape)._replace(**changes))
    assert state.step == 0


def test_draws_are_draws():
    x0, y = batch()
    with pytest.raises(ValueError, match="draws must be Draws, got tuple"):
        train_step(build(), x0, y, draws=(x0,))


def test_a_network_that_sees_a_guidance_scale_is_given_one_for_each_sample():
    state = build(**{"model.guidance_range": (1.0, 4.0)})
    x0, y = batch()
    drawn = draw(state, x0.shape)
    for w, message in (
        (None, "draws.w must be given"),
        (torch.ones(3), r"must be floating \[4\]"),
        (torch.zeros(4), "from 1 to 4"),
    ):
        with pytest.raises(ValueError, match=message):
            train_step(state, x0, y, draws=drawn._replace(w=w))
    train_step(state, x0, y, draws=drawn)
