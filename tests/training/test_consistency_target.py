"""The consistency target of a step: pair or increments, in which precision, from whose weights."""

import copy
import dataclasses
import json

import pytest
import torch

from soflow_fast import ObjectiveConfig, TrainState, preset, train_step
from soflow_fast.config.schema import DiTConfig
from soflow_fast.errors import ConfigError
from soflow_fast.objective import ConsistencyPoints
from soflow_fast.runs import checkpoint
from soflow_fast.train import main as train
from soflow_fast.training import consistency_target, step
from soflow_fast.training.consistency_target import ConsistencyTarget, quotient_cosine, value_and_increment

TINY = DiTConfig(input_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=2, num_heads=2, num_classes=10)
CPU = torch.device("cpu")


@pytest.fixture
def float16(monkeypatch):
    """torch computes in float16 on every CPU, on most of them slowly; the refusal is about the hardware."""
    monkeypatch.setattr(consistency_target, "has_float16", lambda device: True)


def build(seed=0, r=0.01, **changes):
    objective = ObjectiveConfig(guidance_scale=1.0, r_init=r, r_end=r, teacher=changes.pop("teacher", "student"))
    config = preset("digits", **{"precision": "fp32", "device": "cpu", "batch_size": 8, "seed": seed, **changes})
    return off_zero(TrainState.build(dataclasses.replace(config, model=TINY, objective=objective)))


def off_zero(state):
    """Move the weights off their initial zeros, the teacher's elsewhere."""
    with torch.no_grad():
        for flow, scale in ((state.flow, 0.05), (state.teacher, 0.06)):
            for i, p in enumerate(flow.parameters() if flow else ()):
                p.add_(scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return state


def ends(state, r=0.01, n=4, seed=0):
    source = torch.Generator().manual_seed(seed)
    x, target = torch.randn(2, n, 1, 8, 8, generator=source)
    t = 0.5 + 0.4 * torch.rand(n, generator=source)
    s = 0.4 * torch.rand(n, generator=source)
    l = t + r * (s - t)
    dx = target * (l - t).reshape(-1, 1, 1, 1)
    return ConsistencyPoints(x, target, dx, x + dx, t, l, s, torch.tensor([1, 5, 10, 0])[:n])


def batch(seed=0):
    source = torch.Generator().manual_seed(seed)
    return torch.randn(8, 1, 8, 8, generator=source), torch.randint(10, (8,), generator=source)


def difference(state, at, start, end):
    """value at the start and the float64 difference of the ends, from copies in float64."""
    start, end = (copy.deepcopy(flow).double().network for flow in (start, end))
    x, dx, t, l, s = (v.double() for v in (at.x, at.dx, at.t, at.l, at.s))
    with torch.no_grad():
        value = start(x, t, s, at.y)
        return value, end(x + dx, l, s, at.y) - value


def relative(got, wanted):
    return ((got.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize(
    ("changes", "precision", "wanted"),
    [
        ({}, "fp32", ("pair", "fp32", "student")),
        ({}, "bf16", ("increments", "bf16", "student")),
        ({"quotient": "increments"}, "fp32", ("increments", "fp32", "student")),
        ({"quotient": "pair"}, "bf16", ("pair", "fp32", "student")),
        ({"quotient_precision": "fp32"}, "bf16", ("pair", "fp32", "student")),
        ({"quotient_precision": "bf16"}, "fp32", ("increments", "bf16", "student")),
        ({"quotient": "pair", "quotient_precision": "bf16"}, "bf16", ("pair", "bf16", "student")),
        ({"quotient": "increments", "quotient_precision": "fp32"}, "bf16", ("increments", "fp32", "student")),
        ({"teacher": "ema"}, "bf16", ("increments", "bf16", "ema")),
    ],
)
def test_auto_is_increments_where_products_are_rounded(changes, precision, wanted):
    config = preset("digits", precision=precision, **changes)
    assert consistency_target.resolve_target(config, precision, CPU) == ConsistencyTarget(*wanted)


def test_combinations_without_sense_are_refused_in_one_line(monkeypatch):
    def refused(**changes):
        with pytest.raises(ConfigError) as error:
            TrainState.build(preset("digits", device="cpu", **changes))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "tf32: only NVIDIA GPUs" in refused(quotient_precision="tf32")
    monkeypatch.setattr(consistency_target, "has_float16", lambda device: False)
    assert refused(quotient_precision="fp16") == "--quotient-precision fp16: this cpu has no float16 products"


def test_a_network_without_a_paired_forward_is_refused():
    state = build(precision="bf16")
    state.flow.network.__class__ = type("UNet", (torch.nn.Module,), dict(state.flow.network.__class__.__dict__))
    with pytest.raises(ValueError, match="net must be a DiT, got UNet: it has no value-and-increment forward"):
        train_step(state, *batch())


@pytest.mark.parametrize("r", [0.1, 0.002])
@pytest.mark.parametrize(
    ("kind", "precision", "bound"),
    [
        ("pair", "fp32", 1e-3),
        ("increments", "fp32", 1e-4),
        ("increments", "bf16", 3e-2),
        ("increments", "fp16", 1e-2),
    ],
)
def test_increment_of_the_student(kind, precision, bound, r, float16):
    state = build()
    at = ends(state, r)
    value, increment = value_and_increment(ConsistencyTarget(kind, precision, "student"), state.flow, None, at, None)
    value64, increment64 = difference(state, at, state.flow, state.flow)
    assert relative(value, value64) < bound and relative(increment, increment64) < bound


def test_a_pair_of_rounded_ends_is_what_it_is(float16):
    """The errors that increments avoid, so that the comparison above could fail."""
    state = build()
    at = ends(state, 0.002)
    exact = difference(state, at, state.flow, state.flow)[1]
    errors = [
        relative(value_and_increment(ConsistencyTarget("pair", p, "student"), state.flow, None, at, None)[1], exact)
        for p in ("bf16", "fp16")
    ]
    assert errors[0] > 0.3 and 0.03 < errors[1] < errors[0]


def test_the_students_own_output_is_the_start_of_a_pair():
    state = build()
    at = ends(state)
    given = torch.full_like(at.x, 3.0)
    value, increment = value_and_increment(ConsistencyTarget("pair", "fp32", "student"), state.flow, None, at, given)
    with torch.no_grad():
        end = state.flow.network(at.x_l, at.l, at.s, at.y)
    assert torch.equal(value, given) and torch.equal(increment, end - given)


@pytest.mark.parametrize("kind", ["pair", "increments"])
def test_ema_teacher_gives_both_ends_and_the_student_the_value(kind):
    state = build(teacher="ema")
    at = ends(state)
    value, increment = value_and_increment(ConsistencyTarget(kind, "fp32", "ema"), state.flow, state.teacher, at, None)
    assert relative(value, difference(state, at, state.flow, state.flow)[0]) < 1e-5
    assert relative(increment, difference(state, at, state.teacher, state.teacher)[1]) < 1e-3
    assert relative(increment, difference(state, at, state.flow, state.flow)[1]) > 0.01  # the two networks do differ


@pytest.mark.parametrize("teacher", ["student", "ema"])
def test_step_takes_the_teachers_quotient(teacher):
    """mean q^2 of the step against the objective's own network calls."""
    state = build(teacher=teacher, **{"objective.fm_fraction": 0.0})
    x0, y = batch()
    from soflow_fast.training.step import draw

    d = draw(state, x0.shape)
    label = torch.where(d.label_dropped, 10, y)[d.n_fm :]
    x0, x1, t, l, s = (v[d.n_fm :] for v in (x0, d.x1, d.t, d.l, d.s))
    given = None if teacher == "student" else state.teacher
    wanted = state.objective.consistency(state.flow, x0, x1, t, l, s, label, teacher=given).mse
    got = train_step(state, *batch())["sc_mse"]
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("step", "decay"), [(0, 0.1), (5, 0.4), (500, 0.7)])
def test_teacher_follows_the_student_with_its_own_decay(step, decay):
    state = build(teacher="ema")
    objective = dataclasses.replace(state.config.objective, teacher_decay=0.7)
    state.config, state.step = dataclasses.replace(state.config, objective=objective), step
    before = [p.clone() for p in state.teacher.parameters()]
    train_step(state, *batch())
    for old, new, p in zip(before, state.teacher.parameters(), state.flow.parameters(), strict=True):
        torch.testing.assert_close(new, decay * old + (1 - decay) * p, rtol=1e-5, atol=1e-7)
        assert not new.requires_grad


def test_teacher_is_saved_and_resumed_to_the_bit(tmp_path):
    states = [build(teacher="ema") for _ in range(2)]
    train_step(states[0], *batch())
    checkpoint.save(tmp_path, states[0])
    assert checkpoint.resume(tmp_path, states[1], print)
    for state in states:
        train_step(state, *batch(1))
    for a, b in zip(states[0].teacher.parameters(), states[1].teacher.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(states[0].flow.parameters(), states[1].flow.parameters(), strict=True):
        assert torch.equal(a, b)


# The measured cosine


@pytest.mark.parametrize(
    ("how", "least", "most"),
    [
        (ConsistencyTarget("increments", "bf16", "student"), 0.999, 1.001),
        (ConsistencyTarget("increments", "bf16", "ema"), 0.999, 1.001),
        (ConsistencyTarget("pair", "fp32", "student"), 0.9999, 1.001),
        (ConsistencyTarget("pair", "bf16", "student"), -1.0, 0.9),
    ],
    ids=str,
)
def test_cosine_shows_the_trap(how, least, most):
    state = build(teacher=how.teacher)
    at = ends(state, 0.0001)
    given = value_and_increment(how, state.flow, state.teacher, at, None)
    q = state.objective.quotient(state.flow, at, *given)
    assert least <= quotient_cosine(how, state.objective, state.flow, state.teacher, at, q) <= most


def test_step_measures_the_cosine_now_and_then():
    state = build(precision="bf16", **{"run.check_quotient_every": 3})
    found = [train_step(state, *batch(i)).get("q_cosine") for i in range(6)]
    assert [value is not None for value in found] == [False, False, True] * 2
    assert all(value > 0.999 for value in found if value is not None)
    state.config = dataclasses.replace(state.config, run=dataclasses.replace(state.config.run, check_quotient_every=0))
    assert all("q_cosine" not in train_step(state, *batch(i)) for i in range(3))


def test_a_float32_pair_is_compared_with_increments(monkeypatch):
    """Not with itself, whose cosine would be 1 whatever is wrong."""
    asked = []
    plain = consistency_target.value_and_increment
    monkeypatch.setattr(consistency_target, "value_and_increment", lambda how, *a: asked.append(how) or plain(how, *a))
    for teacher in ("student", "ema"):
        state = build(teacher=teacher)
        at = ends(state, 0.01)
        how = ConsistencyTarget("pair", "fp32", teacher)
        quotient_cosine(how, state.objective, state.flow, state.teacher, at, torch.ones_like(at.x))
    assert [how.kind for how in asked] == ["increments", "increments"]


def test_the_cosine_is_measured_once_a_step(monkeypatch):
    measured = []
    plain = step.quotient_cosine
    monkeypatch.setattr(step, "quotient_cosine", lambda *a: measured.append(len(a[-1])) or plain(*a))
    state = build(precision="bf16", **{"run.check_quotient_every": 1, "micro_batch": 3})
    train_step(state, *batch(0))
    assert len(measured) == 1


def test_cosine_reaches_the_log(tmp_path, capsys):
    sizes = ["model.hidden_size=16", "model.depth=1", "model.num_heads=1", "run.log_every=4", "run.sample_every=0"]
    sets = [word for field in [*sizes, "run.check_quotient_every=3", "data.kind=digits"] for word in ("--set", field)]
    flags = ["--run-dir", str(tmp_path / "run"), "--steps", "8", "--batch-size", "8", "--precision", "bf16"]
    train(["digits", *flags, "--checkpoint-every", "0", *sets])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    # Where it is measured there is a line: at steps 3 and 6, beside those of 4 and 8.
    assert [(line["step"], "q_cosine" in line) for line in lines] == [(3, True), (4, False), (6, True), (8, False)]
    assert all(line["q_cosine"] > 0.99 for line in lines if "q_cosine" in line)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["quotient"], config["quotient_precision"]) == ("increments", "bf16")


@pytest.mark.parametrize("teacher", ["student", "ema"])
def test_what_acts_on_a_call_acts_at_both_ends(teacher):
    """A hook that changes an output, in a step whose increments would not call the layer: as in float32."""
    cosines = []
    for precision in ("bf16", "fp32"):
        state = build(precision=precision, teacher=teacher)
        network = (state.teacher or state.flow).network
        network.blocks[1].mlp.fc1.register_forward_hook(lambda module, given, out: out * 1.5)
        at = ends(state)
        value, increment = value_and_increment(state.target, state.flow, state.teacher, at, None)
        cosines.append(torch.cat([value.flatten(), 100 * increment.flatten()]))
        exact = difference(state, at, state.teacher or state.flow, state.teacher or state.flow)[1]
        assert relative(increment, exact) < 2e-3
    assert torch.cosine_similarity(*cosines, dim=0) > 0.99
