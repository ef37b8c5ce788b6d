"""RAdam against torch's own, its float64 average, the steps that accumulate it, and steps that are refused."""

import math

import pytest
import torch

from soflow_fast import TrainState, draw, preset, train_step
from soflow_fast.errors import ConfigError
from soflow_fast.runs import checkpoint
from soflow_fast.training.optimizer import AVERAGE, RAdam
from soflow_fast.training.step import ema_decay
from tests.states import FIELDS, advance

RADAM = {**FIELDS, "optim.kind": "radam", "optim.lr": 0.01, "optim.lr_schedule": "constant"}
WIDE = {**RADAM, "optim.ema_every": 3, "optim.ema_precision": "fp64", "optim.ema_decay": 0.9}


def build(**changes):
    return TrainState.build(preset("digits", **{**RADAM, **changes}))


def gradients(state, step):
    source = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=source) for p in state.flow.parameters()]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_it_is_torchs(decay):
    """Over the border at which the step is rectified: with betas (0.9, 0.99) the sixth."""
    state = build(**{"optim.weight_decay": decay})
    assert isinstance(state.optimizer, RAdam)
    theirs = [torch.nn.Parameter(p.detach().double().clone()) for p in state.flow.parameters()]
    settings = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": decay}
    reference = torch.optim.RAdam(theirs, decoupled_weight_decay=True, **settings)
    for step in range(12):
        for p, q, gradient in zip(state.flow.parameters(), theirs, gradients(state, step), strict=True):
            p.grad, q.grad = gradient.clone(), 0.5 * gradient.double()
        state.optimizer.step(grad_scale=torch.tensor(0.5), finite=torch.tensor(True))
        reference.step()
        for p, q in zip(state.flow.parameters(), theirs, strict=True):
            # Each of twelve steps rounds the weight once, of a size of about one.
            assert (p.detach() - q.detach()).abs().max() < 12 * 2**-23 * max(1, float(q.detach().abs().max()))


def test_a_step_that_is_not_finite_changes_nothing():
    state = advance(build(**WIDE), 4)
    before = {
        name: value.clone() for name, value in checkpoint.snapshot(state).tensors["optimizer.safetensors"].items()
    }
    weights = [p.detach().clone() for p in (*state.flow.parameters(), *state.ema.parameters())]
    for p in state.flow.parameters():
        p.grad = torch.full_like(p, math.nan)
    state.optimizer.ema_decays.fill_(0.5)
    state.optimizer.step(grad_scale=torch.tensor(math.nan), finite=torch.tensor(False))
    after = checkpoint.snapshot(state).tensors["optimizer.safetensors"]
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert all(map(torch.equal, weights, (*state.flow.parameters(), *state.ema.parameters())))


def test_the_average_is_that_of_every_third_step_in_float64():
    state, decay = build(**WIDE), 0.9
    average = [p.detach().double() for p in state.ema.parameters()]
    for step in range(7):
        assert ema_decay(state) == (decay**3 if step in (2, 5) else 1.0)
        before = [p.detach().clone() for p in state.ema.parameters()]
        advance(state, 1)
        if step in (2, 5):
            average = [
                a + (1 - decay**3) * (p.detach() - a) for a, p in zip(average, state.flow.parameters(), strict=True)
            ]
        else:
            assert all(map(torch.equal, before, state.ema.parameters()))
        wide = [state.optimizer.state[p][AVERAGE] for p in state.flow.parameters()]
        for a, b, rounded in zip(average, wide, state.ema.parameters(), strict=True):
            assert b.dtype == torch.float64 and torch.allclose(a, b, rtol=1e-14, atol=1e-16)
            assert rounded.dtype == torch.float32 and torch.equal(b.float(), rounded)


@pytest.mark.parametrize("fields", [RADAM, WIDE], ids=["float32", "float64"])
def test_a_resumed_run_is_the_same_to_the_bit(fields, tmp_path):
    whole = advance(TrainState.build(preset("digits", **fields)), 7)
    first = advance(TrainState.build(preset("digits", **fields)), 4)
    checkpoint.save(tmp_path, first)
    second = TrainState.build(preset("digits", **fields))
    assert checkpoint.resume(tmp_path, second, print)
    advance(second, 3)
    for one, other in ((whole.flow, second.flow), (whole.ema, second.ema)):
        assert all(map(torch.equal, one.parameters(), other.parameters()))
    ours, theirs = (s.optimizer.state_dict()["state"] for s in (whole, second))
    for number, entry in ours.items():
        assert entry.keys() == theirs[number].keys()
        for name, value in entry.items():
            assert value.dtype == theirs[number][name].dtype and torch.equal(value, theirs[number][name]), name
    content = checkpoint.load_whole(tmp_path)
    assert all(entry.keys() == {"step", "exp_avg", "exp_avg_sq"} for entry in content.moments.values())


def test_a_teacher_has_an_average_of_its_own_beside_the_wide_one():
    state = advance(build(**{**WIDE, "objective.teacher": "ema", "objective.teacher_decay": 0.5}), 1)
    assert state.teacher is not None
    start = build(**WIDE)
    moved = zip(start.flow.parameters(), state.flow.parameters(), state.teacher.parameters(), strict=True)
    for p, q, teacher in moved:  # its decay rises from 1/10
        assert torch.allclose(teacher, p + 0.9 * (q - p), rtol=1e-5, atol=1e-7)


def test_in_bf16_it_updates_masters():
    state = build(precision="bf16")
    block = state.flow.network.blocks[0].mlp.fc1.weight
    assert block.dtype == torch.bfloat16
    advance(state, 2)
    masters = dict(zip(map(id, state.flow.parameters()), state.optimizer.masters, strict=True))
    master = masters[id(block)]
    assert master.dtype == torch.float32 and torch.equal(master.to(torch.bfloat16), block)
    assert not torch.equal(master, block.float())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optim.kind": "adamw", "optim.ema_precision": "fp64"}, "optim.ema_precision must be fp32"),
        ({"optimizer": "torch"}, "run.optimizer must be left at soflow"),
        ({"parallel": "fsdp"}, "run.parallel must be ddp"),
        ({"optim.ema_every": 0}, "optim.ema_every must be in"),
    ],
)
def test_what_it_does_not_go_with(changes, said):
    with pytest.raises(ConfigError, match=said):
        build(**changes)


def test_it_learns():
    """One batch at the same noise and times in every step."""
    state = build(batch_size=8)
    x, y = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1, torch.arange(8)
    draws = draw(state, x.shape)
    losses = [float(train_step(state, x, y, draws=draws)["fm_mse"]) for _ in range(25)]
    assert losses[-1] < 0.8 * losses[0]
