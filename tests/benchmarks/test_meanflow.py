"""The MeanFlow baselines: their gate is green for what is right, red for each way to be wrong, and they agree."""

import sys
import types
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad

from benchmarks import account, contestants, gates
from benchmarks.baselines import dual, meanflow, meanflow_gate
from benchmarks.baselines.meanflow import At, Settings, Student
from benchmarks.contestants import DIFFERENCE, FLASH, MEANFLOW, QUARTER, on_a_quarter
from benchmarks.recipes import Recipe, build, plain_operations
from soflow_fast.config.schema import (
    Config,
    DataConfig,
    DiTConfig,
    FlowConfig,
    ObjectiveConfig,
    RunConfig,
    override,
)
from soflow_fast.models.dit import Tape
from soflow_fast.training.state import TrainState

CONFIG = Config(
    model=DiTConfig(input_size=4, patch_size=2, in_channels=2, hidden_size=16, depth=3, num_heads=2, num_classes=3),
    data=DataConfig(kind="latents"),
    run=RunConfig(device="cpu"),
    batch_size=8,
)
LOW = override(CONFIG, {"precision": "bf16", "model.hidden_size": 64})
"""Wide enough that what t does to du/dt, 4 % here and 40 % at hidden 768, is more than twice what bf16 does, 1 %."""


def by_jvp(state, at, student):
    return meanflow.jvp(state.flow.network, at)[1]


BY_JVP = on_a_quarter("by torch.func.jvp", by_jvp, taped=False)
BY_HALVES = on_a_quarter("by halves of blocks", partial(meanflow.by_tangents, attention=dual.composed))
RECIPES = [MEANFLOW, QUARTER, BY_HALVES, BY_JVP, DIFFERENCE]


def check(config: Config, recipe: Recipe) -> dict[str, float]:
    assert recipe.gate is not None
    return recipe.gate(config, recipe)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize(
    "objective",
    [ObjectiveConfig(), ObjectiveConfig(mix_ratio=1.0), ObjectiveConfig(guidance_scale=1.0)],
    ids=["mixed", "guided", "unguided"],
)
def test_gate_is_green(recipe, objective):
    errors = check(replace(CONFIG, objective=objective), recipe)
    # Of float32 rounding on so small a network, hundreds of units in the last place are left to spare.
    assert max(error for name, error in errors.items() if "du/dt" not in name) < 5e-5
    assert errors["du/dt"] < (5e-3 if recipe is DIFFERENCE else 1e-5)
    assert errors["du/dt in the step"] < (5e-3 if recipe is DIFFERENCE else 1e-5)


def one_step(recipe: Recipe, config: Config = CONFIG) -> tuple[TrainState, dict[str, torch.Tensor]]:
    config = override(config, gates.CHANGES)
    state = build(recipe, config)
    return state, recipe.step(state, *gates.random_batch(config, state.device))


def test_all_ways_make_the_same_step():
    """Loss and gradients of every two recipes: within what both gates leave, and for the finite difference within what
    its error in du/dt is of the whole residual: |t - r| |du/dt| error / |u - u_tgt|, less than that error here."""
    states, metrics = zip(*map(one_step, RECIPES), strict=True)
    gradients = [[gates.gradient(p) for p in state.flow.parameters()] for state in states]
    for recipe, other, found in zip(RECIPES[1:], gradients[1:], metrics[1:], strict=True):
        tolerance = 2 * gates.GRADIENT_TOLERANCE if recipe is DIFFERENCE else 1e-5
        assert gates.relative(other, gradients[0]) < tolerance
        for name in ("loss", "sc_mse", "fm_mse"):
            assert gates.relative([found[name]], [metrics[0][name]]) < tolerance


@torch.library.custom_op("soflow_fast_tests::silent_attention", mutates_args=())
def silent_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).clone()


def silent(state: TrainState, at: At, student: Student) -> torch.Tensor:
    """A JVP through a library operation that has no forward-mode formula."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meanflow, "composed_attention", silent_attention)
        return meanflow.jvp(state.flow.network, at)[1]


def no_tangent(state, at, student):
    return torch.zeros_like(student.output)


def of_z_alone(state, at, student):
    network = state.flow.network
    with meanflow.attending(network, meanflow.composed_attention):
        return torch.func.jvp(lambda z: network(z, at.t, at.r, at.y), (at.z,), (at.v,))[1]


def of_t_alone(state, at, student):
    return meanflow.by_tangents(state, at._replace(v=torch.zeros_like(at.v)), student)


def with_r(state, at, student):
    """dr/dt = 1: t - r does not move."""
    network = state.flow.network
    one = torch.ones_like(at.t)
    with meanflow.attending(network, meanflow.composed_attention):
        inputs, tangents = (at.z, at.t, at.r), (at.v, one, one)
        return torch.func.jvp(lambda z, t, r: network(z, t, r, at.y), inputs, tangents)[1]


def without(part):
    """The tangents beside the student's values, those of one part of the network left out."""

    def derivative(state, at, student):
        plain = getattr(dual, part)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dual, part, lambda *given: 0 * plain(*given))
            return meanflow.by_tangents(state, at, student)

    derivative.__name__ = f"without_{part}"
    return derivative


WRONG = [silent, no_tangent, of_z_alone, of_t_alone, with_r, without("composed"), without("conditioning")]


@pytest.mark.parametrize("derivative", WRONG, ids=lambda f: f.__name__)
def test_gate_is_red_for_a_wrong_tangent(derivative):
    with pytest.raises(gates.RedGate, match=r"in fp32 against float64.*du/dt"):
        check(CONFIG, on_a_quarter("tampered", derivative))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_gate_is_green_in_the_timed_precision(recipe):
    errors = check(LOW, recipe)
    # A difference is one of float32 forwards.
    assert errors["du/dt in bf16"] < (1e-3 if recipe is DIFFERENCE else 2**-6)
    assert errors["gradient in bf16"] > 1e-4, "bf16 rounds"


def only_in_bf16(wrong, right):
    def derivative(state, at, student):
        return (wrong if state.precision == "bf16" else right)(state, at, student)

    return derivative


@pytest.mark.parametrize("derivative", WRONG, ids=lambda f: f.__name__)
def test_gate_is_red_for_a_tangent_that_is_wrong_in_the_timed_precision(derivative):
    tampered = only_in_bf16(derivative, meanflow.by_tangents)
    with pytest.raises(gates.RedGate, match=r"in bf16 against float64.*du/dt"):
        check(LOW, on_a_quarter("tampered", tampered))
    assert check(CONFIG, on_a_quarter("tampered", tampered))


def test_gate_is_red_for_a_difference_that_is_wrong_in_the_timed_precision():
    """The central difference, divided by one h instead of two; and one of bf16 forwards, which is all rounding."""

    def halved(state, at, student):
        return meanflow.by_difference(state, at, student) * (2 if state.precision == "bf16" else 1)

    def drowned(state, at, student):
        if state.precision == "fp32":
            return meanflow.by_difference(state, at, student)
        network, h = state.flow.network, meanflow.STEP
        ends = [network(at.z + k * h * at.v, at.t + k * h, at.r, at.y).float() for k in (1, -1)]
        return (ends[0] - ends[1]) / (2 * h)

    for derivative in (halved, drowned):
        with pytest.raises(gates.RedGate, match=r"in bf16 against float64.*du/dt"):
            check(LOW, on_a_quarter("tampered", derivative, None, taped=False))


@pytest.mark.parametrize("config", [CONFIG, LOW], ids=lambda config: config.precision)
def test_gate_looks_at_the_derivative_that_the_step_takes(config):
    """A right derivative is shown to the gate, and the step takes none."""
    losses = partial(meanflow.losses_on_a_quarter, derivative=no_tangent)
    tampered = QUARTER._replace(step=partial(meanflow.train_step, losses=losses, settings=Settings()))
    with pytest.raises(gates.RedGate, match="du/dt in the step: relative error 1"):
        check(config, tampered)


@pytest.mark.parametrize("recipe", [MEANFLOW, QUARTER, DIFFERENCE], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("changes", [{"guidance_scale": 2.0}, {"mix_ratio": 0.5}], ids=["guidance", "mix"])
def test_gate_is_red_for_a_loss_that_is_wrong_in_the_timed_precision(recipe, changes):
    def step(state, x0, y):
        kept = state.objective
        if state.precision == "bf16":
            state.objective = type(kept)(replace(kept.config, **changes))
        metrics = recipe.step(state, x0, y)
        state.objective = kept
        return metrics

    assert check(CONFIG, recipe._replace(step=step))
    with pytest.raises(gates.RedGate, match="in bf16 against float64"):
        check(LOW, recipe._replace(step=step))


def test_gate_is_red_where_its_own_yardstick_is_broken(monkeypatch):
    """The JVP from which the tolerance in bf16 is measured must be right itself."""
    monkeypatch.setattr(meanflow, "composed_attention", silent_attention)
    monkeypatch.setattr(meanflow_gate, "jvp", lambda network, at: [0 * value for value in meanflow.jvp(network, at)])
    assert check(CONFIG, QUARTER)
    with pytest.raises(gates.RedGate, match=r"du/dt in bf16 is rounding by 1.0e.00, which hides"):
        check(LOW, QUARTER)


@pytest.mark.parametrize("seed", [0, 2])
def test_difference_at_the_depth_of_the_public_networks(seed):
    """Twelve blocks round a forward by more than 2^-22 of its output; the tolerance is measured, not assumed, and one
    that is off by 1 % is still told from a right one."""
    config = override(CONFIG, {"model.hidden_size": 384, "model.depth": 12, "model.num_heads": 6, "seed": seed})
    config = override(config, gates.CHANGES)
    state = build(DIFFERENCE, config)
    wide = gates.Rounding(meanflow_gate.widened(state))
    x0, y = gates.random_batch(config, state.device)
    u, at = meanflow_gate.place(wide, state, x0, y, meanflow.draw(state, x0.shape, Settings()))
    exact = meanflow_gate.derivative_of(wide, at)
    tolerance = meanflow_gate.difference_tolerance(state, wide, at, exact)
    found = meanflow_gate.found_at(state, at, meanflow.by_difference)
    assert gates.relative([found], [exact]) < tolerance < 5e-3
    near = meanflow_gate.single(at)
    rounding = gates.Rounding(state.flow.network, "fp32")(near.z, near.t, near.r, near.y) - u
    assert rounding.norm() > 2**-22 * u.norm()
    assert gates.relative([1.01 * found], [exact]) > tolerance


def test_a_step_that_drowns_the_difference_is_red(monkeypatch):
    monkeypatch.setattr(meanflow_gate, "STEP", 1e-6)
    with pytest.raises(gates.RedGate, match="hides all else"):
        check(CONFIG, DIFFERENCE)


TAMPERED = {
    "guidance": {"objective.guidance_scale": 2.0},
    "mix": {"objective.mix_ratio": 0.5},
    "end of guidance": {"objective.guidance_decay_time": 0.1},
    "label drop": {"objective.label_drop": 0.9},
    "learning rate": {"optim.lr": 0.9},
    "average": {"optim.ema_decay": 0.9},
}


@pytest.mark.parametrize("recipe", [MEANFLOW, QUARTER], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("changes", TAMPERED.values(), ids=TAMPERED.keys())
def test_gate_is_red_for_another_recipe(recipe, changes):
    """What the step computes under other settings than those that the gate was given."""

    def step(state, x0, y):
        kept = state.config, state.objective
        state.config = override(state.config, changes)
        state.objective = type(state.objective)(state.config.objective)
        metrics = recipe.step(state, x0, y)
        state.config, state.objective = kept
        return metrics

    with pytest.raises(gates.RedGate):
        check(CONFIG, recipe._replace(step=step))


@pytest.mark.parametrize("settings", [Settings(p=0.5), Settings(equal=0.5), Settings(time=(0.4, 1.0)), Settings(eps=1)])
def test_gate_is_red_for_other_settings(settings):
    losses = partial(meanflow.losses_on_a_quarter, derivative=by_jvp)
    tampered = QUARTER._replace(step=partial(meanflow.train_step, losses=losses, settings=settings))
    with pytest.raises(gates.RedGate):
        check(CONFIG, tampered)


def test_gate_is_red_for_a_target_with_a_gradient():
    """u_tgt is to be constant: here the derivative refuses to let go of its graph."""
    right = meanflow.jvp

    def attached(network, at):
        u, derivative = right(network, at)
        derivative.detach = lambda: derivative
        return u, derivative

    def step(state, x0, y):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(meanflow, "jvp", attached)
            return MEANFLOW.step(state, x0, y)

    with pytest.raises(gates.RedGate, match="gradient"):
        check(CONFIG, MEANFLOW._replace(step=step))


def at_random(state: TrainState) -> tuple[At, Student]:
    """Samples somewhere, and the student's forward there."""
    x0, y = gates.random_batch(state.config, state.device)
    t = torch.linspace(0.5, 0.9, len(x0))
    at, tape = At(x0, t, t / 2, y, x0.flip(0)), Tape(slice(None))
    with torch.no_grad(), plain_operations():
        return at, Student(state.flow.network(at.z, at.t, at.r, at.y, tape=tape), tape)


def test_compiled_code_is_used_again(monkeypatch):
    """Two variants of a block, the first and the others; a third derivative needs no more."""
    counter = CompileCounter()
    compiled = torch.compile(dual.whole, backend=counter, fullgraph=True, dynamic=False)
    monkeypatch.setattr(dual, "compiled", lambda: dual.EAGER._replace(whole=compiled))
    state = build(QUARTER, CONFIG)
    at, student = at_random(state)
    with torch.no_grad(), plain_operations():
        for _ in range(3):
            found = meanflow.by_tangents(state, at, student, compiled=True)
            assert gates.relative([found], [by_jvp(state, at, student)]) < 1e-5
    assert counter.frame_count == 2


@pytest.mark.parametrize("part", ["before", "after", "whole"])
def test_every_part_of_a_block_compiles_without_a_break(part, monkeypatch):
    compiled = torch.compile(getattr(dual, part), backend="eager", fullgraph=True, dynamic=False)
    monkeypatch.setattr(dual, "compiled", lambda: dual.EAGER._replace(**{part: compiled}))
    state = build(QUARTER, CONFIG)
    at, student = at_random(state)
    attention = None if part == "whole" else dual.composed
    with torch.no_grad(), plain_operations():
        found = meanflow.by_tangents(state, at, student, compiled=True, attention=attention)
        assert gates.relative([found], [by_jvp(state, at, student)]) < 1e-5


def test_a_derivative_costs_one_forward():
    """A product for each layer, where torch.func.jvp makes three; attention makes five where a forward makes two, which
    on 16 tokens of 64 channels are 3 * 16 / (12 * 64 + 2 * 16) = 6 % of the forward. The rest is the conditioning."""
    config = override(CONFIG, {"model.hidden_size": 64, "model.input_size": 8})
    state = build(QUARTER, config)
    at, student = at_random(state)
    one = account.forward_flops(state, at.z)
    with torch.no_grad():
        tangents = account.flops(lambda: meanflow.by_tangents(state, at, student)) / one
        jvp = account.flops(lambda: by_jvp(state, at, student)) / one
    assert tangents == pytest.approx(1 + 3 * 16 / (12 * 64 + 2 * 16), abs=0.02)
    assert jvp == pytest.approx(3, abs=0.02)


def test_flash_jvp_takes_the_function_that_carries_tangents(monkeypatch):
    """A stand-in for the package, right at first, then one that drops the tangents without a word."""

    class JVPAttn:
        @staticmethod
        def fwd_dual(q, k, v, sm_scale):
            assert q.shape[-1] in dual.FLASH_HEADS, "filled up with zeros"
            return ((q * sm_scale) @ k.mT).softmax(-1) @ v

    right = JVPAttn.fwd_dual

    def dropping(q, k, v, sm_scale):
        return right(*(forward_ad.unpack_dual(value).primal for value in (q, k, v)), sm_scale)

    module = types.ModuleType("jvp_flash_attention.jvp_attention")
    module.JVPAttn = JVPAttn  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "jvp_flash_attention", types.ModuleType("jvp_flash_attention"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert FLASH.gate is not None
    with torch.compiler.set_stance("force_eager"):
        assert FLASH.gate(CONFIG, FLASH)["du/dt"] < 1e-5
        assert FLASH.gate(LOW, FLASH)["du/dt in bf16"] < 2**-6
        monkeypatch.setattr(JVPAttn, "fwd_dual", staticmethod(dropping))
        with pytest.raises(AssertionError, match="lost the tangent"):
            FLASH.gate(CONFIG, FLASH)


def test_reasons():
    assert contestants.why_no_flash_jvp(CONFIG) is not None
    with pytest.raises(ValueError, match="linear path"):
        meanflow.build(replace(CONFIG, flow=FlowConfig(path="trig")))
