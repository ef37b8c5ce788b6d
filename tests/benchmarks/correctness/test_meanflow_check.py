"""The check of the MeanFlow baselines passes what is right and names each way to be wrong; all right ways agree."""

from functools import partial

import pytest
import torch

from benchmarks.baselines import dual, meanflow
from benchmarks.baselines.meanflow import At, Settings, Student
from benchmarks.correctness import comparison
from benchmarks.correctness import meanflow as meanflow_check
from benchmarks.correctness.comparison import IncorrectResult, relative
from benchmarks.harness.cases import random_batch
from benchmarks.harness.contestants import DIFFERENCE, MEANFLOW, PUBLISHED, QUARTER, TIM, on_a_quarter
from benchmarks.harness.recipes import Recipe, build
from soflow_fast.config.schema import Config, override
from soflow_fast.training.state import TrainState
from tests.benchmarks import tiny
from tests.benchmarks.tiny import with_objective, with_settings

CONFIG = override(tiny.CONFIG, {"model.depth": 3})
LOW = override(CONFIG, {"precision": "bf16", "model.hidden_size": 64})
"""Wide enough that what t does to du/dt, 4 % here and 40 % at hidden 768, is more than twice what bf16 does, 1 %."""


def by_jvp(state, at, student):
    return meanflow.jvp(state.flow.network, at)[1]


BY_JVP = on_a_quarter("by torch.func.jvp", by_jvp, taped=False)
BY_HALVES = on_a_quarter("by halves of blocks", partial(meanflow.by_tangents, attention=dual.composed))
RECIPES = [MEANFLOW, QUARTER, BY_HALVES, BY_JVP, DIFFERENCE]


def check(config: Config, recipe: Recipe) -> dict[str, float]:
    assert recipe.check is not None
    return recipe.check(config, recipe)


GUIDANCE = {
    "mixed": {},
    "guided": {"objective.mix_ratio": 1.0},
    "unguided": {"objective.guidance_scale": 1.0},
}


@pytest.mark.parametrize(
    ("recipe", "guidance"),
    [
        *((recipe, "mixed") for recipe in RECIPES),
        *((recipe, name) for recipe in (MEANFLOW, QUARTER) for name in ("guided", "unguided")),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_what_is_right_passes(recipe, guidance):
    errors = check(override(CONFIG, GUIDANCE[guidance]), recipe)
    # Of float32 rounding on so small a network, hundreds of units in the last place are left to spare.
    assert max(error for name, error in errors.items() if "du/dt" not in name) < 5e-5
    assert errors["du/dt"] < (5e-3 if recipe is DIFFERENCE else 1e-5)
    assert errors["du/dt in the step"] < (5e-3 if recipe is DIFFERENCE else 1e-5)


def test_a_central_difference_of_low_precision_passes():
    """In float32 at its half-width; in bf16 with ends far enough apart that rounding leaves something to see."""
    errors = check(LOW, TIM)
    assert errors["du/dt"] < 1e-4 and 1e-3 < errors["du/dt in bf16"] < 0.1
    assert TIM.why_not(LOW) is None and "float32" in str(TIM.why_not(CONFIG))


@pytest.mark.parametrize(
    ("fault", "precision"),
    [
        (lambda half_width: partial(meanflow.by_central_difference, half_width=3 * half_width), "fp32"),
        (lambda half_width: by_jvp, "fp32"),
        (lambda half_width: no_tangent, "bf16"),
        (lambda half_width: lambda *given: -meanflow.by_central_difference(*given, half_width=half_width), "bf16"),
    ],
    ids=["wider", "the derivative itself", "none in bf16", "reversed in bf16"],
)
def test_another_derivative_than_the_central_difference_is_found(fault, precision):
    def at(half_width: float) -> Recipe:
        by = partial(meanflow.by_central_difference, half_width=half_width)
        wrong = fault(half_width)

        def either(state, *given):
            return (wrong if state.precision == precision else by)(state, *given)

        return on_a_quarter("tampered", either, None, taped=False)

    config = override(LOW, {"model.depth": 2})
    way = {"at_half_width": at, "half_width": 0.1, "settings": PUBLISHED}
    with pytest.raises(IncorrectResult, match=f"tampered in {precision} .*: du/dt"):
        meanflow_check.check_central_difference(config, at(0.1), **way)


def one_step(recipe: Recipe, config: Config = CONFIG) -> tuple[TrainState, dict[str, torch.Tensor]]:
    config = override(config, comparison.CHANGES)
    state = build(recipe, config)
    return state, recipe.step(state, *random_batch(config, state.device))


def test_all_ways_make_the_same_step():
    """Loss and gradients of every two recipes: within what both checks leave, and for the finite difference within what
    its error in du/dt is of the whole residual: |t - r| |du/dt| error / |u - u_tgt|, less than that error here."""
    states, metrics = zip(*map(one_step, RECIPES), strict=True)
    gradients = [[comparison.gradient(p) for p in state.flow.parameters()] for state in states]
    for recipe, other, found in zip(RECIPES[1:], gradients[1:], metrics[1:], strict=True):
        tolerance = 2 * comparison.GRADIENT_TOLERANCE if recipe is DIFFERENCE else 1e-5
        assert relative(other, gradients[0]) < tolerance
        for name in ("loss", "sc_mse", "fm_mse"):
            assert relative([found[name]], [metrics[0][name]]) < tolerance


@torch.library.custom_op("soflow_fast_tests::silent_attention", mutates_args=())
def silent_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).clone()


def silent(state: TrainState, at: At, student: Student) -> torch.Tensor:
    """A JVP through a library operation that has no forward-mode formula."""
    return meanflow.jvp(state.flow.network, at, silent_attention)[1]


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


without_conditioning = without("conditioning")
WRONG = [silent, no_tangent, of_z_alone, of_t_alone, with_r, without("composed"), without_conditioning]


@pytest.mark.parametrize("derivative", WRONG, ids=lambda f: f.__name__)
def test_a_wrong_tangent_is_found(derivative):
    with pytest.raises(IncorrectResult, match=r"in fp32 against float64.*du/dt"):
        check(CONFIG, on_a_quarter("tampered", derivative))


@pytest.mark.parametrize("recipe", [MEANFLOW, QUARTER, DIFFERENCE], ids=lambda recipe: recipe.name)
def test_what_is_right_passes_in_the_timed_precision(recipe):
    errors = check(LOW, recipe)
    # A difference is one of float32 forwards.
    assert errors["du/dt in bf16"] < (1e-3 if recipe is DIFFERENCE else 2**-6)
    assert errors["gradient in bf16"] > 1e-4, "bf16 rounds"


@pytest.mark.parametrize("derivative", [silent, without_conditioning], ids=lambda f: f.__name__)
def test_a_tangent_that_is_wrong_in_the_timed_precision_is_found(derivative):
    """The smallest part of du/dt, that of the conditioning, is more than bf16 hides."""

    def tampered(state, at, student):
        return (derivative if state.precision == "bf16" else meanflow.by_tangents)(state, at, student)

    with pytest.raises(IncorrectResult, match=r"in bf16 against float64.*du/dt"):
        check(LOW, on_a_quarter("tampered", tampered))


def test_a_difference_that_is_wrong_in_the_timed_precision_is_found():
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
        with pytest.raises(IncorrectResult, match=r"in bf16 against float64.*du/dt"):
            check(LOW, on_a_quarter("tampered", derivative, None, taped=False))


def test_the_derivative_that_the_step_takes_is_looked_at():
    """A right derivative is shown to the check, and the step takes none."""
    losses = partial(meanflow.losses_on_a_quarter, derivative=no_tangent)
    tampered = QUARTER._replace(step=partial(meanflow.train_step, losses=losses, settings=Settings()))
    with pytest.raises(IncorrectResult, match="du/dt in the step: relative error 1"):
        check(CONFIG, tampered)


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [(QUARTER, {"guidance_scale": 2.0}), (MEANFLOW, {"mix_ratio": 0.5})],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_loss_that_is_wrong_in_the_timed_precision_is_found(recipe, changes):
    tampered = recipe._replace(step=with_objective(recipe.step, "bf16", **changes))
    with pytest.raises(IncorrectResult, match="in bf16 against float64"):
        check(LOW, tampered)


def test_a_broken_yardstick_is_found(monkeypatch):
    """The JVP from which the tolerance in bf16 is measured must be right itself."""
    monkeypatch.setattr(meanflow_check, "jvp", lambda network, at: [0 * value for value in meanflow.jvp(network, at)])
    with pytest.raises(IncorrectResult, match=r"du/dt in bf16 is rounding by 1.0e.00, which hides"):
        check(LOW, QUARTER)


@pytest.mark.slow
def test_difference_at_the_depth_of_the_public_networks():
    """Twelve blocks round a forward by more than 2^-22 of its output; the tolerance is measured, not assumed, and one
    that is off by 1 % is still told from a right one."""
    config = override(CONFIG, {"model.hidden_size": 384, "model.depth": 12, "model.num_heads": 6})
    config = override(config, comparison.CHANGES)
    state = build(DIFFERENCE, config)
    wide = comparison.PlainNetwork(meanflow_check.widened(state))
    x0, y = random_batch(config, state.device)
    u, at = meanflow_check.place(wide, state, x0, y, meanflow.draw(state, x0.shape, Settings()))
    exact = meanflow_check.derivative_of(wide, at)
    tolerance = meanflow_check.difference_tolerance(state, wide, at, exact)
    found = meanflow_check.found_at(state, at, meanflow.by_difference)
    assert relative([found], [exact]) < tolerance < 5e-3
    near = meanflow_check.single(at)
    rounding = comparison.PlainNetwork(state.flow.network, "fp32")(near.z, near.t, near.r, near.y) - u
    assert rounding.norm() > 2**-22 * u.norm()
    assert relative([1.01 * found], [exact]) > tolerance


def test_a_step_that_drowns_the_difference_is_found(monkeypatch):
    monkeypatch.setattr(meanflow_check, "STEP", 1e-6)
    with pytest.raises(IncorrectResult, match="hides all else"):
        check(CONFIG, DIFFERENCE)


OTHER_SETTINGS = {
    "guidance": {"objective.guidance_scale": 2.0},
    "mix": {"objective.mix_ratio": 0.5},
    "end of guidance": {"objective.guidance_decay_time": 0.1},
    "label drop": {"objective.label_drop": 0.9},
    "learning rate": {"optim.lr": 0.9},
    "average": {"optim.ema_decay": 0.9},
}


@pytest.mark.parametrize("changes", OTHER_SETTINGS)
def test_a_step_under_other_settings_is_found(changes):
    """Guidance, mix and dropped labels go through the losses of each recipe; they share the rest."""
    recipe = MEANFLOW if changes in ("mix", "label drop") else QUARTER
    with pytest.raises(IncorrectResult):
        check(CONFIG, with_settings(recipe, OTHER_SETTINGS[changes]))


@pytest.mark.parametrize("settings", [Settings(p=0.5), Settings(equal=0.5), Settings(time=(0.4, 1.0)), Settings(eps=1)])
def test_other_settings_of_meanflow_are_found(settings):
    losses = partial(meanflow.losses_on_a_quarter, derivative=by_jvp)
    tampered = QUARTER._replace(step=partial(meanflow.train_step, losses=losses, settings=settings))
    with pytest.raises(IncorrectResult):
        check(CONFIG, tampered)


def test_a_target_with_a_gradient_is_found():
    """u_tgt is to be constant: here the derivative refuses to let go of its graph."""

    def attached(network, at):
        u, derivative = meanflow.jvp(network, at)
        derivative.detach = lambda: derivative
        return u, derivative

    losses = partial(meanflow.losses_as_published, values_and_derivative=attached)
    step = partial(meanflow.train_step, losses=losses, settings=Settings())
    with pytest.raises(IncorrectResult, match="gradient"):
        check(CONFIG, MEANFLOW._replace(step=step))
