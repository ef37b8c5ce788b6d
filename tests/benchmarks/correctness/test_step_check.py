"""The check of a training step passes what is right and names each way to be wrong."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks.baselines import authors, fused
from benchmarks.baselines.authors import AUTHORS, PAIRED, of_pair, train_step_fused
from benchmarks.correctness import comparison
from benchmarks.correctness import step as step_check
from benchmarks.correctness.comparison import IncorrectResult, count_calls
from benchmarks.harness.cases import random_batch
from benchmarks.harness.recipes import OURS, VARIANTS, build, ours
from soflow_fast.config.schema import ObjectiveConfig, override
from soflow_fast.flow import SolutionFlow
from soflow_fast.models.dit import DiT
from tests.benchmarks.tiny import CONFIG, with_objective

TAMPERED = {
    "guidance": {"objective.guidance_scale": 2.0},
    "mix": {"objective.mix_ratio": 0.5},
    "guidance decay": {"objective.guidance_decay_time": 0.1},
    "weights": {"objective.eps": 0.1},
    "look-ahead": {"objective.r_init": 0.5},
    "label drop": {"objective.label_drop": 0.9},
    "learning rate": {"optim.lr": 0.9},
    "average": {"optim.ema_decay": 0.9},
}


@pytest.mark.parametrize(
    ("objective", "ours", "theirs"),
    [
        (ObjectiveConfig(), 3, 6),
        (ObjectiveConfig(mix_ratio=1.0), 3, 5),
        (ObjectiveConfig(guidance_scale=1.0), 2, 3),
    ],
    ids=["mixed", "guided", "unguided"],
)
def test_what_is_right_passes_and_its_calls_are_counted(objective, ours, theirs):
    config = replace(CONFIG, objective=objective)
    assert max(step_check.check(config, AUTHORS).values()) < 5e-5
    for recipe, wanted in ((OURS, ours), (AUTHORS, theirs)):
        state = recipe.build(config)
        assert count_calls(recipe, state, *random_batch(config, state.device))[0] == wanted


def test_calls_of_a_guide_are_counted():
    """A guide of layers of its own, as guidance in float8 has, makes one of the engine's three calls."""
    state = OURS.build(CONFIG)
    state.guide = SolutionFlow(copy.copy(state.flow.network))
    assert count_calls(OURS, state, *random_batch(CONFIG, state.device))[0] == 3
    assert type(state.guide.network) is type(state.flow.network) is DiT  # as they were


@pytest.mark.parametrize("changes", TAMPERED.values(), ids=TAMPERED.keys())
def test_a_baseline_that_computes_something_else_is_found(changes):
    tampered = AUTHORS._replace(build=lambda config, weights=None: AUTHORS.build(override(config, changes), weights))
    with pytest.raises(IncorrectResult):
        step_check.check(CONFIG, tampered)


def test_a_baseline_that_calls_the_network_once_more_is_found():
    def step(state, x0, y, **told):
        with torch.no_grad():
            state.flow.velocity(x0, torch.ones(len(x0)), y)
        return AUTHORS.step(state, x0, y, **told)

    with pytest.raises(IncorrectResult, match="7 times, not 6"):
        step_check.check(CONFIG, AUTHORS._replace(step=step))


def test_increments_of_the_timed_precision_are_compared():
    """bf16 with increments is what a GPU races in: broken increments must not pass."""

    def step(state, x0, y, observe=None):
        def told(name, **tensors):
            if observe is not None:
                observe(name, **tensors | ({"increment": 0 * tensors["increment"]} if name == "target" else {}))

        return OURS.step(state, x0, y, observe=told)

    low = replace(CONFIG, precision="bf16")
    assert step_check.check_precision(CONFIG) == {}
    assert set(step_check.check_precision(low)) == {"fm_mse", "sc_mse", "increments", "direction of the gradient"}
    with pytest.raises(IncorrectResult, match="bf16 against float32: increments"):
        step_check.check_precision(low, OURS._replace(step=step))


FUSED = AUTHORS._replace(name="fused", build=fused.build, step=train_step_fused)
"""The authors' recipe as it is compiled, but for the compiler: in bf16 throughout."""
PAIRS = [
    FUSED._replace(name=f"fused, {p} pair", step=partial(train_step_fused, consistency=partial(of_pair, precision=p)))
    for p in ("fp32", "tf32")
]
"""The same with a quotient of two values in another precision."""


@pytest.mark.parametrize(
    ("recipe", "seed"),
    [(FUSED, 0), (FUSED, 1), (PAIRS[0], 0), (OURS, 0), (VARIANTS[0], 0)],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_baseline_is_held_to_the_precision_that_is_timed(recipe, seed):
    errors = step_check.check_timed(replace(CONFIG, precision="bf16", seed=seed), recipe)
    assert set(errors) == {"fm_mse in bf16", "sc_mse in bf16", "grad_norm in bf16", "gradient in bf16"}
    assert errors["gradient in bf16"] > 1e-4, "bf16 rounds"
    assert step_check.check_timed(CONFIG, recipe) == {}


def test_a_pair_of_its_own_is_what_its_name_says():
    """In float32 it is the authors' recipe; in bf16, where the look-ahead is short, its mean q^2 is that of the
    engine's step with a float32 pair, which a bf16 pair misses."""
    for pair in PAIRS:
        assert max(step_check.check(CONFIG, pair).values()) < 5e-5
    assert [recipe.network_calls for recipe in PAIRED] == [authors.network_calls] * 2
    low = override(CONFIG, {"precision": "bf16", "objective.r_init": 0.0003})
    state = FUSED.build(low)
    assert count_calls(PAIRS[0], state, *random_batch(low, state.device))[0] == 7
    found = {}
    for recipe in (VARIANTS[0], PAIRS[0], FUSED):
        state = build(recipe, low)
        found[recipe.name] = float(recipe.step(state, *random_batch(low, state.device))["sc_mse"])
    wanted, pair, plain = found.values()
    assert pair == pytest.approx(wanted, rel=1e-4) and plain > 1.01 * wanted, found


def test_compiled_code_is_checked_where_it_is_timed_and_formulas_alone_in_float32(monkeypatch):
    """And with float32 timed, there."""
    seen = []

    def step(state, x0, y, **told):
        seen.append((state.precision, torch._dynamo.eval_frame._stance.stance, len(x0)))
        return FUSED.step(state, x0, y, **told)

    recipe = FUSED._replace(step=step, compiled=True)
    config = replace(CONFIG, batch_size=16)
    step_check.check(config, recipe)
    assert seen == [("fp32", "default", 16)]
    seen.clear()
    step_check.check(replace(config, precision="bf16"), recipe)
    assert seen == [("bf16", "default", 16), ("fp32", "force_eager", 8)]


def test_check_goes_through_the_timed_precision():
    assert "gradient in bf16" in step_check.check(replace(CONFIG, precision="bf16"), FUSED)
    assert "gradient in bf16" in step_check.check(
        replace(CONFIG, precision="bf16"), ours("steps")._replace(checked_steps=1)
    )
    several = step_check.check(replace(CONFIG, precision="bf16"), ours("steps")._replace(checked_steps=3))
    assert "sc_mse in bf16" in several and "gradient in bf16" not in several


def in_bf16_alone(fault):
    """A step that goes wrong in bf16 and is right in float32."""

    def step(state, x0, y, **told):
        return fault(state, x0, y, **told) if state.precision == "bf16" else FUSED.step(state, x0, y, **told)

    return step


def without_consistency(state, x0, y, **told):
    with pytest.MonkeyPatch.context() as patch:
        term = state.objective.consistency
        patch.setattr(state.objective, "consistency", lambda *given: (t := term(*given))._replace(loss=0 * t.loss))
        return FUSED.step(state, x0, y, **told)


FAULTS = {
    "guidance": with_objective(FUSED.step, guidance_scale=2.0),
    "mix": with_objective(FUSED.step, mix_ratio=0.5),
    "weights": with_objective(FUSED.step, p=0.5),
    "other labels": lambda state, x0, y, **told: FUSED.step(state, x0, y.flip(0), **told),
    "no consistency loss": without_consistency,
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_in_the_timed_precision_alone_is_found(fault):
    tampered = FUSED._replace(step=in_bf16_alone(fault))
    config = override(CONFIG, {"model.hidden_size": 64})
    assert step_check.check(config, tampered)
    with pytest.raises(IncorrectResult, match="fused in bf16 against float32"):
        step_check.check(replace(config, precision="bf16"), tampered)


def test_rounding_that_hides_everything_is_found(monkeypatch):
    monkeypatch.setattr(step_check, "ROUNDING_LIMIT", 1e-4)
    with pytest.raises(IncorrectResult, match="gradient is rounding by"):
        step_check.check_timed(replace(CONFIG, precision="bf16"), FUSED)


def test_the_yardstick_is_the_engines_own_step():
    """The formulas in float64 around the float32 network: our gradients and mean squares to rounding."""
    config = override(CONFIG, comparison.CHANGES)
    state = build(OURS, config)
    x0, y = random_batch(config, state.device)
    exact = step_check.whole_step(comparison.PlainNetwork(state.flow.network, "fp32"), state, x0, y)
    metrics = OURS.step(state, x0, y)
    assert comparison.relative([comparison.gradient(p) for p in state.flow.parameters()], exact.gradients) < 1e-5
    for name, found in (("fm_mse", exact.fm), ("sc_mse", exact.sc)):
        assert comparison.relative([metrics[name]], [found.square().mean()]) < 1e-5


def test_a_pass_of_increments_counts_as_a_call():
    state = OURS.build(replace(CONFIG, precision="bf16"))
    assert count_calls(OURS, state, *random_batch(CONFIG, state.device))[0] == 3


def test_the_quotient_that_is_asked_for_makes_no_difference():
    assert step_check.check(override(CONFIG, {"quotient": "pair", "quotient_precision": "bf16"}), AUTHORS)


def test_a_single_wrong_gradient_is_found():
    def step(state, x0, y, **told):
        metrics = AUTHORS.step(state, x0, y, **told)
        state.flow.network.blocks[0].attn.proj.bias.grad.mul_(1.01)
        return metrics

    with pytest.raises(IncorrectResult, match="gradient of"):
        step_check.check(CONFIG, AUTHORS._replace(step=step))
