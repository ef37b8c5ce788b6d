"""Training for a range of guidance scales: what is drawn, where it enters, and that it is the objective's gradient."""

import dataclasses
import math
from collections import Counter

import pytest
import torch

from soflow_fast import Objective, ObjectiveConfig, TrainState, preset, train_step
from soflow_fast.commands.dry_run import forward_flops
from soflow_fast.objective import without_guidance
from soflow_fast.training.consistency_target import resolve_target
from soflow_fast.training.memory_estimate import estimate_memory
from soflow_fast.training.plan.parameters import parameter_groups
from soflow_fast.training.plan.work import passes
from soflow_fast.training.state import build_flow
from soflow_fast.training.step import Draws, draw
from soflow_fast.training.time_estimate import count_step
from soflow_kernels.lookahead import guided_target
from tests.training.test_step import TINY, batch

RANGE = (1.0, 4.0)
RANGED = dataclasses.replace(TINY, guidance_range=RANGE)


def build(objective=None, **fields):
    config = preset("digits", precision="fp32", device="cpu", batch_size=8, **fields)
    config = dataclasses.replace(config, model=RANGED, objective=objective or ObjectiveConfig())
    state = TrainState.build(config)
    with torch.no_grad():  # off its initial zeros, where half of the gradients vanish
        for i, p in enumerate(state.flow.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return state


def test_scales_are_log_uniform_in_their_range():
    w = Objective(guidance_range=(1.5, 6.0)).guidance_scales(20_000, torch.Generator().manual_seed(0))
    assert w.shape == (20_000,) and 1.5 <= w.min() < 1.51 and 5.95 < w.max() <= 6.0
    u = ((w / 1.5).log() / math.log(4)).sort()[0]
    assert (u - torch.linspace(0, 1, len(u))).abs().max() < 1.63 / len(u) ** 0.5  # Kolmogorov-Smirnov, at 1 %


def test_draws_have_scales_and_are_what_they_were_otherwise():
    shape = torch.Size((8, 1, 8, 8))
    ranged = build()
    plain = TrainState.build(dataclasses.replace(ranged.config, model=TINY))
    a, b = draw(ranged, shape), draw(plain, shape)
    assert b.w is None and a.w is not None and a.w.shape == (8,)
    assert all(torch.equal(x, y) for x, y in zip(a[:5], b[:5], strict=True)) and a.n_fm == b.n_fm
    assert torch.equal(draw(ranged, shape).w, a.w)
    ranged.step = 1
    assert not torch.equal(draw(ranged, shape).w, a.w)
    assert Draws(*b[:6]) == Draws.of(b.tensors, b.n_fm)  # as others build them


def test_where_the_label_is_dropped_there_is_no_guidance():
    w, dropped = torch.tensor([2.0, 3.0]), torch.tensor([True, False])
    assert without_guidance(w, torch.zeros(2), dropped).tolist() == [1.0, 3.0]
    assert without_guidance(w, torch.zeros(2), None).tolist() == [2.0, 3.0]
    assert without_guidance(w, None, dropped).tolist() == [1.0, 1.0]
    assert without_guidance(None, torch.zeros(2), dropped) is None


@pytest.mark.parametrize("labelled", [True, False])
def test_the_network_is_asked_without_a_label_at_one_and_else_at_each_samples_scale(labelled):
    state = build(ObjectiveConfig(label_drop=0.3))
    calls = []
    state.flow.network.register_forward_pre_hook(lambda module, given: calls.append(given[3:5]))
    x0, y = batch()
    draws = draw(state, x0.shape)
    assert 0 < draws.label_dropped.sum() < 8
    train_step(state, x0, y if labelled else None, draws=draws)
    null = torch.full((8,), 10)
    label, w = torch.where(draws.label_dropped, null, y), torch.where(draws.label_dropped, 1.0, draws.w)
    if not labelled:
        assert [given[0] for given in calls] == [None, None] and all((given[1] == 1).all() for given in calls)
        return
    sc = slice(draws.n_fm, 8)
    wanted = [(torch.cat([null, label[sc]]), torch.cat([torch.ones(8), w[sc]])), (label, w), (label[sc], w[sc])]
    for given, (labels, scales) in zip(calls, wanted, strict=True):
        assert torch.equal(given[0], labels) and torch.equal(given[1], scales)


@pytest.mark.parametrize(
    ("fields", "decay"), [({}, 0.8), ({"micro_batch": 3}, 0.8), ({"quotient": "increments"}, 1.0)], ids=str
)
def test_the_step_is_the_objectives_own_gradient(fields, decay):
    """One call at a time, on each sample's own scale."""
    state = build(ObjectiveConfig(label_drop=0.3, guidance_decay_time=decay), **fields)
    flow, objective = state.flow, state.objective
    x0, y = batch()
    draws = draw(state, x0.shape)
    n, parts = draws.n_fm, (slice(0, draws.n_fm), slice(draws.n_fm, 8))
    terms = []
    for part, call in zip(parts, (objective.flow_matching, objective.consistency), strict=True):
        times = (draws.t,) if call == objective.flow_matching else (draws.t, draws.l, draws.s)
        given = [value[part] for value in (x0, draws.x1, *times, y, draws.label_dropped)]
        assert draws.w is not None
        terms.append(call(flow, *given, w=draws.w[part]))
    (terms[0].loss * (n / 8) + terms[1].loss * (1 - n / 8)).backward()
    wanted = {name: p.grad.clone() for name, p in flow.named_parameters()}
    got = train_step(state, x0, y, draws=draws)
    torch.testing.assert_close(got["fm_mse"], terms[0].mse, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got["sc_mse"], terms[1].mse, rtol=1e-3, atol=1e-6)
    for name, p in flow.named_parameters():
        error = (p.grad.double() - wanted[name].double()).norm()
        assert error <= 1e-3 * wanted[name].double().norm() + 1e-7, name


def test_the_target_is_each_samples_own():
    """v_t + c(t) (w - 1) (v_t - v_null), mixed: a range of almost nothing is the scale of all."""
    one = build(ObjectiveConfig(guidance_scale=2.5, label_drop=0.0))
    x0, _ = batch()
    draws = draw(one, x0.shape)._replace(w=torch.full((8,), 2.5))
    x_t, v_t = one.flow.point(x0, draws.x1, draws.t)
    objective = one.objective
    v_null = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(1))
    single = Objective(one.config.objective).look_ahead(x_t, v_t, draws.t, draws.l, v_null, v_t, None)
    each = objective.look_ahead(x_t, v_t, draws.t, draws.l, v_null, v_t, None, draws.w)
    assert all(map(torch.equal, single, each))
    w = torch.linspace(1, 4, 8)
    target = objective.look_ahead(x_t, v_t, draws.t, draws.l, v_null, v_t, None, w).target
    for k in range(8):
        mine = (value[k : k + 1] for value in (v_t, v_null, v_t, draws.t))
        wanted = guided_target(*mine, None, float(w[k]), 0.8, 0.25)
        torch.testing.assert_close(target[k : k + 1], wanted)


def test_what_a_step_needs_is_predicted_with_the_embedder():
    config = build().config
    plain = dataclasses.replace(config, model=TINY)
    parameters = 256 * 32 + 32 + 32 * 32 + 32
    a, b = estimate_memory(config), estimate_memory(plain)
    assert a.averages - b.averages >= 4 * parameters and a.moments - b.moments >= 8 * parameters
    groups = [parameter_groups(build_flow(each).network) for each in (config, plain)]
    assert groups[0].ends.numel - groups[1].ends.numel == parameters
    # One product more in each pass over the network, and its two in the backward; the other kernels take it along.
    counts = [Counter(op.name for op in count_step(each)) for each in (config, plain)]
    kernels = [Counter({name: n for name, n in each.items() if "/" in name}) for each in counts]
    assert not kernels[1] - kernels[0] and sum((kernels[0] - kernels[1]).values()) <= 1  # the sums of three biases
    unguided = dataclasses.replace(config, objective=ObjectiveConfig(guidance_scale=1.0))
    target = resolve_target(unguided, "fp32", torch.device("cpu"))
    assert passes(unguided, target, "fp32", 8)["guidance"] == 1


def test_a_network_that_sees_scales_needs_them():
    state = build()
    draws = draw(state, batch()[0].shape)
    with pytest.raises(ValueError, match=r"^draws\.w must be given: the network sees a guidance scale"):
        train_step(state, *batch(), draws=draws._replace(w=None))


@pytest.mark.parametrize("kind", ["flow-matching", "meanflow"])
def test_the_other_objectives_take_scales_too(kind):
    """The same step on two scales, of no labels dropped, ends in two losses."""
    losses = []
    for w in (1.0, 4.0):
        state = build(ObjectiveConfig(kind=kind, label_drop=0.0, guidance_decay_time=1.0))
        draws = draw(state, batch()[0].shape)._replace(w=torch.full((8,), w))
        losses.append(train_step(state, *batch(), draws=draws))
        assert float(state.flow.network.w_embedder.mlp[2].weight.grad.norm()) > 0
    parts = [name for name in losses[0] if name.endswith("mse")]
    assert parts and all(losses[0][name] != losses[1][name] for name in parts)


def test_guidance_is_needed_whatever_the_scale_of_all_is():
    """1, no guidance, is for networks without a range."""
    state = build(ObjectiveConfig(guidance_scale=1.0))
    assert state.objective.guided and state.objective.mixed
    assert forward_flops(state) > 0
    assert math.isfinite(train_step(state, *batch())["fm_loss"])
