"""The training step of a U-Net: one mask at both ends of the quotient, whatever the parts, ranks and restarts."""

import copy
import dataclasses

import pytest
import torch

from soflow_fast import TrainState, draw, preset, train_step
from soflow_fast.augmentation import Changes, augmented
from soflow_fast.errors import ConfigError
from soflow_fast.models._seeded_dropout import SeededDropout
from soflow_fast.objective import ConsistencyPoints
from soflow_fast.ranks import share
from soflow_fast.runs import checkpoint
from soflow_fast.training.consistency_target import value_and_increment
from soflow_fast.training.optimizer import AVERAGE
from soflow_fast.training.parallel import join
from soflow_fast.training.precision import matmul_precision
from soflow_fast.training.step import Draws
from tests.forked import on_ranks
from tests.unets import advance, build, images, roughened


def masks_of(state, x0, **given):
    """Of each forward in a step: the network, and the seeds that its first layer with dropout has got."""
    found = []
    networks = {"student": state.flow.network} | ({"teacher": state.teacher.network} if state.teacher else {})
    for name, network in networks.items():
        dropout = next(layer for layer in network.modules() if isinstance(layer, SeededDropout))
        dropout.register_forward_hook(lambda layer, *_, name=name: found.append((name, layer._seeds)))
    train_step(state, x0, None, **given)
    return found


@pytest.mark.parametrize("teacher", ["student", "ema"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_both_ends_of_the_quotient_leave_out_the_same(teacher, precision):
    state = build(precision=precision, **{"objective.teacher": teacher})
    seeds = draw(state, (4, 3, 8, 8)).dropout
    found = masks_of(state, images(0))
    # The student with gradient; then the end, and the start where the student's own output is of another precision or
    # network; the teacher takes both.
    own = ["student"] if precision == "fp32" else ["student", "student"]
    assert [name for name, _ in found] == ["student", *(own if teacher == "student" else ["teacher", "teacher"])]
    assert all(torch.equal(mask, seeds) for _, mask in found)


def test_a_part_of_the_batch_has_its_own_masks():
    state = build(micro_batch=2, **{"objective.fm_fraction": 0.5})
    seeds = draw(state, (4, 3, 8, 8)).dropout
    found = [mask.tolist() for _, mask in masks_of(state, images(0))]
    students, ends = found[::2], found[1::2]
    assert sorted(seed for student in students for seed in student) == sorted(seeds.tolist())
    assert all(end == student[1:] for student, end in zip(students, ends, strict=True))  # the consistency samples'


def test_the_quotient_without_dropout_at_one_end_would_be_wrong():
    """What the seeds are for: with other masks at the two ends the increment is that of the masks."""
    state = advance(build(**{"objective.r_init": 0.01, "objective.r_end": 0.01, "steps": 100}), 3)
    seen = {}

    def observe(name, **values):
        seen.setdefault(name, values)

    draws = draw(state, (4, 3, 8, 8))
    train_step(state, images(3), None, draws=draws, observe=observe)
    at = seen["target"]["points"]
    assert isinstance(at, ConsistencyPoints) and at.dropout is not None
    network = roughened(state.ema.network)  # any weights: the masks decide
    with torch.no_grad():
        start = network(at.x, at.t, at.s, dropout=at.dropout)
        same = network(at.x_l, at.l, at.s, dropout=at.dropout) - start
        other = network(at.x_l, at.l, at.s, dropout=at.dropout + 1) - start
    assert other.norm() > 5 * same.norm()


@pytest.mark.parametrize("fm_fraction", [0.0, 0.5])
def test_micro_batches_give_the_same_step(fm_fraction):
    """The gradient of a step in parts, to rounding: draws, masks and changes of images belong to the sample."""
    found = []
    for micro_batch in (0, 2, 3):
        state = build(batch_size=6, micro_batch=micro_batch, **{"objective.fm_fraction": fm_fraction})
        metrics = train_step(state, images(0, 6), None)
        found.append((metrics, [p.grad.clone() for p in state.flow.parameters()]))
    (metrics, whole), *others = found
    for other, gradients in others:
        for name in ("sc_mse", "grad_norm"):
            assert float(other[name]) == pytest.approx(float(metrics[name]), rel=1e-4)
        norm = torch.stack([g.norm() for g in whole]).norm()
        error = torch.stack([(a - b).norm() for a, b in zip(gradients, whole, strict=True)]).norm()
        assert error < 1e-4 * norm


def test_two_ranks_take_their_shares_of_one_draw():
    state, ranks = build(batch_size=4), [TrainState.build(build(batch_size=4).config, rank=r, world=2) for r in (0, 1)]
    whole = draw(state, (4, 3, 8, 8))
    parts = [draw(rank, (2, 3, 8, 8)) for rank in ranks]
    for name in ("dropout", "augmentation", "x1"):
        value = getattr(whole, name)
        got = torch.cat([getattr(part, name) for part in parts])
        assert sorted(map(str, got.tolist())) == sorted(map(str, value.tolist()))


def three_steps(launch, folder):
    """On a share of each batch, saved by all ranks together; the average of the weights."""
    config = build(batch_size=4).config
    parallel = join(launch, config.run, torch.device("cpu"))
    state = TrainState.build(config, parallel=parallel)
    for step in range(3):
        train_step(state, images(step, 4)[share(4, 0, launch.rank, launch.world)], None)
    checkpoint.save(folder, state)
    return {name: value.clone() for name, value in state.ema.state_dict().items()}


def test_two_ranks_train_and_save_what_one_does(tmp_path):
    first, second = on_ranks(2, three_steps, tmp_path)
    alone, resumed = advance(build(batch_size=4), 3), build(batch_size=4)
    assert checkpoint.resume(tmp_path, resumed, print) and resumed.step == 3
    for name, value in resumed.ema.state_dict().items():
        assert torch.equal(value, first[name]) and torch.equal(value, second[name])
    moved = torch.stack([(a - b).norm() for a, b in zip(alone.ema.parameters(), build().ema.parameters(), strict=True)])
    errors = [(a - b).norm() for a, b in zip(alone.ema.parameters(), resumed.ema.parameters(), strict=True)]
    assert torch.stack(errors).norm() < 1e-3 * moved.norm()
    entry = next(iter(resumed.optimizer.state_dict()["state"].values()))
    assert entry[AVERAGE].dtype == torch.float64
    train_step(resumed, images(3), None)


def test_the_step_learns_the_changed_image_and_tells_the_network():
    state, seen = build(**{"model.dropout": 0.0}), {}
    draws = draw(state, (4, 3, 8, 8))
    assert draws.dropout is None and draws.augmentation.shape == (4, 8)
    train_step(state, images(0), None, draws=draws, observe=lambda name, **values: seen.setdefault(name, values))
    samples, made = seen["student"]["samples"], Changes.of(draws.augmentation)
    x_t, v_t = state.flow.point(augmented(images(0), made), draws.x1, draws.t)
    assert torch.equal(samples.augmentation, made.labels) and torch.equal(samples.x_t, x_t)
    assert torch.equal(samples.v_t, v_t) and torch.equal(seen["target"]["points"].augmentation, made.labels)


def test_a_resumed_run_is_the_same_to_the_bit(tmp_path):
    whole = advance(build(), 6)
    checkpoint.save(tmp_path, advance(build(), 3))
    second = build()
    assert checkpoint.resume(tmp_path, second, print) and second.step == 3
    advance(second, 3)
    for one, other in ((whole.flow, second.flow), (whole.ema, second.ema)):
        assert all(map(torch.equal, one.parameters(), other.parameters()))


def test_it_learns():
    """One batch at the same noise, times, changes and masks in every step."""
    state = build(**{"objective.r_init": 0.1, "objective.r_end": 0.1})
    draws = draw(state, (4, 3, 8, 8))
    errors = [float(train_step(state, images(0), None, draws=draws)["sc_mse"]) for _ in range(25)]
    assert errors[-1] < 0.8 * errors[0]


def test_the_quotient_is_measured_of_a_rounded_pair_alone():
    every = {"run.check_quotient_every": 1}
    assert "q_cosine" not in train_step(build(**every), images(0), None)
    state = build(precision="bf16", **every, **{"quotient_precision": "bf16", "objective.r_init": 0.01})
    assert -1 <= float(train_step(state, images(0), None)["q_cosine"]) <= 1


def test_a_meanflow_of_a_unet_takes_its_derivative_by_a_float32_pair():
    state = build(**{"objective.kind": "meanflow", "objective.fm_fraction": 0.5})
    assert (state.target.kind, state.target.precision) == ("pair", "fp32")
    assert float(train_step(state, images(0), None)["sc_mse"]) > 0


@pytest.mark.parametrize(
    ("precision", "wanted"), [("fp32", "ieee"), ("tf32", "tf32"), ("bf16", "ieee"), ("fp16", "ieee")]
)
def test_float32_convolutions_are_not_made_in_tf32(precision, wanted):
    """As torch makes them on a GPU unless it is told: a mantissa of ten bits in the pair behind the quotient."""
    cudnn = torch.backends.cudnn
    before = cudnn.conv.fp32_precision, cudnn.deterministic
    with matmul_precision(precision, torch.device("cpu")):
        assert (cudnn.conv.fp32_precision, cudnn.deterministic) == (wanted, True)
    assert (cudnn.conv.fp32_precision, cudnn.deterministic) == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_step_is_the_same_each_time():
    found = []
    for _ in range(2):
        state = advance(build(device="cuda", precision="bf16"), 4)
        found.append([p.detach().clone() for p in (*state.flow.parameters(), *state.ema.parameters())])
    assert all(map(torch.equal, *found))


def error_of_pair(precision, device):
    """The error of an increment beside its value, of rough weights, against float64."""
    state = build(device=device, precision="bf16", quotient_precision=precision)
    assert (state.target.kind, state.target.precision) == ("pair", precision)
    seen = {}
    train_step(state, images(2), None, observe=lambda name, **values: seen.setdefault(name, values))
    at = seen["target"]["points"]
    exact = copy.deepcopy(roughened(state.flow.network)).double()
    value, increment = value_and_increment(state.target, state.flow, None, at, None)
    given = {"augmentation": at.augmentation, "dropout": at.dropout}
    with torch.no_grad():
        t, l, s = at.t.double(), at.l.double(), at.s.double()
        wanted = exact(at.x_l.double(), l, s, **given) - exact(at.x.double(), t, s, **given)
    return float((increment - wanted).norm() / value.norm())


def test_the_pair_is_as_exact_as_it_says():
    """Some thirty layers round by 2^-24 or 2^-9, and the two ends do so independently."""
    assert error_of_pair("fp32", "cpu") < 30 * 2**-24 < 2**-9 < error_of_pair("bf16", "cpu") < 30 * 2**-9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_pair_is_as_exact_as_it_says():
    """Were its convolutions in TF32, it would err as fp16 does."""
    assert error_of_pair("fp32", "cuda") < 30 * 2**-24 < 2**-12 < error_of_pair("fp16", "cuda") < 30 * 2**-12


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_leaves_out_the_same():
    layer, seeds = SeededDropout(0.3), torch.arange(-8, 8, dtype=torch.int32)
    shape = torch.Size([5, 7, 9])
    assert torch.equal(layer.kept(seeds, shape), layer.kept(seeds.cuda(), shape).cpu())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quotient": "increments"}, "quotient must be auto or pair with a U-Net"),
        ({"precision": "fp8"}, "precision must be auto, fp32, tf32 or bf16 with a U-Net"),
        ({"parallel": "fsdp"}, "run.parallel must be ddp"),
        ({"compile": True}, "run.compile must be false with a U-Net"),
        ({"cuda_graph": True}, "run.cuda_graph must be left out with a U-Net"),
        ({"attention": "sdpa"}, "run.attention must be auto with a U-Net"),
        ({"recompute": "mlp"}, "run.recompute must be .* with a U-Net"),
        ({"model.augmentation_labels": False}, "data.augment must be 0 without model.augmentation_labels"),
        ({"data.flip": True}, "data.augment must be 0 beside data.flip"),
        ({"model.multipliers": (2,) * 5}, "model.input_size must be a multiple of 16"),
        ({"model.dropout": 1.0}, r"model.dropout must be in \[0, 1\)"),
        ({"model.attention_sizes": (3,)}, "model.attention_sizes must be of 8, 4, or 0 for none"),
    ],
)
def test_what_a_unet_has_not_is_one_line(changes, said):
    with pytest.raises(ConfigError, match=said):
        build(**changes)


def test_draws_from_outside_are_checked():
    state = build()
    draws = draw(state, (4, 3, 8, 8))
    train_step(state, images(0), None, draws=draws._replace(dropout=None, augmentation=None))
    for changes, said in (
        ({"dropout": torch.zeros(4)}, r"draws.dropout must be int32 \[4\]"),
        ({"dropout": torch.zeros(3, dtype=torch.int32)}, r"draws.dropout must be int32 \[4\]"),
        ({"augmentation": torch.zeros(4, 9)}, r"draws.augmentation must be floating \[4, 8\]"),
    ):
        with pytest.raises(ValueError, match=said):
            train_step(state, images(0), None, draws=draws._replace(**changes))
    dit = TrainState.build(preset("digits", batch_size=4, device="cpu", **{"model.depth": 1, "model.hidden_size": 16}))
    given, x, y = draw(dit, (4, 1, 8, 8)), torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
    assert given.dropout is None and Draws.of(given.tensors, given.n_fm) == given
    for name, value in (("dropout", draws.dropout), ("augmentation", draws.augmentation)):
        with pytest.raises(ValueError, match=f"draws.{name}: the network"):
            train_step(dit, x, y, draws=given._replace(**{name: value}))


def test_the_preset_is_the_published_recipe():
    config = preset("cifar10-unet")
    objective, optim, model = config.objective, config.optim, config.model
    assert (objective.fm_fraction, objective.p, objective.eps) == (0.0, 0.75, 1e-3)
    assert (objective.fm_time, objective.sc_end_time, objective.sc_time) == ((-0.9, 1.6), (-4.0, 1.6), (-0.9, 1.6))
    assert (objective.r_init, objective.r_end, objective.r_schedule) == (1.0, 0.0003125, "exponent")
    assert (config.batch_size, config.steps, config.data.augment) == (1024, 800_000, 0.12)
    assert (optim.kind, optim.ema_every, optim.ema_precision) == ("radam", 16, "fp64")
    assert dataclasses.astuple(model) == (32, 3, 128, (2, 2, 2), 4, (16,), 0.3, True, "unet")
