"""The MeanFlow baselines: their gate is green for what is right, red for each way to be wrong, and they agree."""

import sys
import types
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad

from benchmarks import contestants, gates
from benchmarks.baselines import meanflow, meanflow_gate
from benchmarks.baselines.meanflow import At, Settings
from benchmarks.contestants import DIFFERENCE, FLASH, MEANFLOW, QUARTER, on_a_quarter
from benchmarks.recipes import Recipe, build, plain_operations
from soflow_fast.config import Config, DataConfig, DiTConfig, FlowConfig, ObjectiveConfig, RunConfig, override
from soflow_fast.quotient import products
from soflow_fast.state import TrainState

CONFIG = Config(
    model=DiTConfig(input_size=4, patch_size=2, in_channels=2, hidden_size=16, depth=3, num_heads=2, num_classes=3),
    data=DataConfig(kind="latents"),
    run=RunConfig(device="cpu"),
    batch_size=8,
)
BY_BLOCKS = on_a_quarter(
    "by blocks", lambda state, at, given: meanflow.jvp_by_blocks(state.flow.network, at, meanflow.block_jvp)
)
RECIPES = [MEANFLOW, QUARTER, BY_BLOCKS, DIFFERENCE]


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
    assert max(error for name, error in errors.items() if name != "du/dt") < 5e-5
    assert errors["du/dt"] < (5e-3 if recipe is DIFFERENCE else 1e-5)


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


def silent(state: TrainState, at: At, given: torch.Tensor) -> torch.Tensor:
    """A JVP through a library operation that has no forward-mode formula."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meanflow, "composed_attention", silent_attention)
        return meanflow.jvp(state.flow.network, at)[1]


def no_tangent(state, at, given):
    return torch.zeros_like(given)


def of_z_alone(state, at, given):
    network = state.flow.network
    with meanflow.attending(network, meanflow.composed_attention):
        return torch.func.jvp(lambda z: network(z, at.t, at.r, at.y), (at.z,), (at.v,))[1]


def of_t_alone(state, at, given):
    return meanflow.by_jvp(state, at._replace(v=torch.zeros_like(at.v)), given)


def with_r(state, at, given):
    """dr/dt = 1: t - r does not move."""
    network = state.flow.network
    one = torch.ones_like(at.t)
    with meanflow.attending(network, meanflow.composed_attention):
        inputs, tangents = (at.z, at.t, at.r), (at.v, one, one)
        return torch.func.jvp(lambda z, t, r: network(z, t, r, at.y), inputs, tangents)[1]


@pytest.mark.parametrize("derivative", [silent, no_tangent, of_z_alone, of_t_alone, with_r], ids=lambda f: f.__name__)
def test_gate_is_red_for_a_wrong_tangent(derivative):
    with pytest.raises(gates.RedGate, match="du/dt"):
        check(CONFIG, on_a_quarter("tampered", derivative))


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
    losses = partial(meanflow.losses_on_a_quarter, derivative=meanflow.by_jvp)
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


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_derivative_in_bf16(recipe):
    """Within the rounding of bf16, 2^-8 an operand: a JVP of a few layers errs by some units of it, not by itself. The
    finite difference takes both of its ends in float32 and errs by less."""
    config = replace(CONFIG, precision="bf16")
    state = build(recipe, config)
    x0, y = gates.random_batch(config, state.device)
    wide = meanflow_gate.widened(state)
    draws = meanflow.draw(state, x0.shape, Settings())
    exact = meanflow_gate.step_in_float64(wide, state, x0, y, draws, Settings())
    given, at = meanflow_gate.at_float64(wide, state, x0, y, draws)
    assert recipe.gate is not None
    with torch.no_grad(), plain_operations(), products("bf16", state.device):
        found = recipe.gate.keywords["derivative"](state, meanflow_gate.single(at), given.float())  # pyright: ignore[reportFunctionMemberAccess]
    assert gates.relative([found], [exact.derivative]) < 2**-4
    assert recipe.step(state, x0, y)["loss"].isfinite()


def test_compiled_code_is_used_again():
    """Two variants of a block, the first and the others; a third step needs no more."""
    counter = CompileCounter()
    compiled = torch.compile(meanflow.block_jvp, backend=counter, fullgraph=True, dynamic=False)
    state = build(QUARTER, CONFIG)
    x0, y = gates.random_batch(CONFIG, state.device)
    t = torch.linspace(0.5, 0.9, len(x0))
    with torch.no_grad(), plain_operations():
        right = meanflow.jvp(state.flow.network, At(x0, t, t / 2, y, x0))[1]
        for _ in range(3):
            found = meanflow.jvp_by_blocks(state.flow.network, At(x0, t, t / 2, y, x0), compiled)
            assert gates.relative([found], [right]) < 1e-5
    assert counter.frame_count == 2


def test_draws():
    state = build(QUARTER, replace(CONFIG, batch_size=4096))
    shape = torch.Size((4096, 2, 4, 4))
    draws = meanflow.draw(state, shape, Settings())
    assert draws.n_equal == 3072
    assert torch.equal(draws.t[:3072], draws.r[:3072]) and bool((draws.r[3072:] < draws.t[3072:]).all())
    # The larger of two normal numbers is 1 / sqrt(pi) above the mean on average; 6 standard errors.
    assert torch.logit(draws.t).mean().item() == pytest.approx(-0.4 + torch.pi**-0.5, abs=6 * 0.83 / 64)
    assert torch.logit(draws.r[3072:]).mean().item() == pytest.approx(-0.4 - torch.pi**-0.5, abs=6 * 0.83 / 32)
    other = meanflow.draw(state, shape, Settings(time=None))
    assert other.n_equal == 3072 and bool((other.r[3072:] < other.t[3072:]).all())


def test_flash_jvp_takes_the_function_that_carries_tangents(monkeypatch):
    """A stand-in for the package: its `fwd_dual` is right, its `fwd` drops the tangents without a word."""

    class JVPAttn:
        @staticmethod
        def fwd_dual(q, k, v, sm_scale):
            assert q.shape[-1] == 16, "filled up with zeros"
            return ((q * sm_scale) @ k.mT).softmax(-1) @ v

        @staticmethod
        def fwd(q, k, v, sm_scale):
            q, k, v = (forward_ad.unpack_dual(value).primal for value in (q, k, v))
            return JVPAttn.fwd_dual(q, k, v, sm_scale)

    module = types.ModuleType("jvp_flash_attention.jvp_attention")
    module.JVPAttn = JVPAttn  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "jvp_flash_attention", types.ModuleType("jvp_flash_attention"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert FLASH.gate is not None
    eager = FLASH._replace(build=meanflow.build)
    assert FLASH.gate(CONFIG, eager)["du/dt"] < 1e-5
    JVPAttn.fwd_dual, JVPAttn.fwd = JVPAttn.fwd, JVPAttn.fwd_dual
    with pytest.raises((gates.RedGate, RecursionError)):
        FLASH.gate(CONFIG, eager)


def test_reasons():
    assert contestants.why_no_flash_jvp(CONFIG) is not None
    with pytest.raises(ValueError, match="linear path"):
        meanflow.build(replace(CONFIG, flow=FlowConfig(path="trig")))
