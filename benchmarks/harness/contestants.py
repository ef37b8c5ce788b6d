"""The recipes that take part in the race, ours first."""

from functools import partial

from benchmarks.baselines import dual, meanflow
from benchmarks.baselines.authors import AUTHORS, COMPILED, PAIRED
from benchmarks.baselines.meanflow import HALF_WIDTH, Derivative, Settings, jvp
from benchmarks.correctness.meanflow import DERIVATIVE_TOLERANCE, TF32_TOLERANCE, check, check_central_difference
from benchmarks.harness.recipes import AS_TRAINED, LOW_GUIDANCE, OURS, VARIANTS, Recipe, why_no_compiler
from soflow_fast.config.schema import Config
from soflow_fast.training.precision import resolve_device, resolve_precision

PUBLISHED = Settings()


def on_a_quarter(
    name: str,
    derivative: Derivative,
    tolerance: float | None = DERIVATIVE_TOLERANCE,
    *,
    taped: bool = True,
    compiled: bool = False,
    settings: Settings = PUBLISHED,
) -> Recipe:
    """MeanFlow with du/dt where r != t only. taped: the derivative takes the products of the student's forward."""
    losses = partial(meanflow.losses_on_a_quarter, derivative=derivative, taped=taped)
    return Recipe(
        name,
        partial(meanflow.build, compiled=compiled),
        partial(meanflow.train_step, losses=losses, settings=settings),
        partial(meanflow.network_calls, separate=False),
        why_no_compiler if compiled else lambda config: None,
        partial(check, derivative=derivative, settings=settings, tolerance=tolerance),
        compiled,
    )


def why_no_flash_jvp(config: Config) -> str | None:
    """Why there is no jvp_flash_attention beside a compiled student."""
    return meanflow.why_no_flash_jvp(config) or why_no_compiler(config)


def why_not_again(config: Config) -> str | None:
    """Why ours need not be timed again."""
    on_cpu = resolve_device(config.run.device).type == "cpu"
    return "on a CPU all are timed in turn" if on_cpu else None


def why_no_compiled_difference(config: Config) -> str | None:
    """Why the finite difference is not compiled."""
    if resolve_device(config.run.device).type == "cpu":
        return "left out on a CPU, where compiling takes most of the benchmarks' time"
    return why_no_compiler(config)


def central_difference(name: str, half_width: float = HALF_WIDTH, *, compiled: bool = False) -> Recipe:
    """MeanFlow with TiM's derivative where r != t: a central difference in the precision of the step."""
    derivative = partial(meanflow.by_central_difference, half_width=half_width)
    recipe = on_a_quarter(name, derivative, None, taped=False, compiled=compiled)
    at_half_width = partial(central_difference, name, compiled=compiled)
    way = {"at_half_width": at_half_width, "half_width": half_width, "settings": PUBLISHED}
    why_not = partial(why_no_low_difference, compiled=compiled)
    return recipe._replace(check=partial(check_central_difference, **way), why_not=why_not)


def why_no_low_difference(config: Config, compiled: bool) -> str | None:
    """Why there is no central difference in the precision of the step."""
    if resolve_precision(config.precision, resolve_device(config.run.device)) == "fp32":
        return "it is one in bf16, and the step is in float32 here"
    return why_no_compiler(config) if compiled else None


MEANFLOW = Recipe(
    "MeanFlow as published",
    meanflow.build,
    partial(meanflow.train_step, losses=meanflow.losses_as_published, settings=PUBLISHED),
    partial(meanflow.network_calls, separate=True),
    check=partial(
        check,
        derivative=lambda state, at, student: jvp(state.flow.network, at)[1],
        settings=PUBLISHED,
        tolerance=DERIVATIVE_TOLERANCE,
    ),
)
QUARTER = on_a_quarter("MeanFlow, JVP on a quarter", meanflow.by_tangents)
QUARTER_COMPILED = on_a_quarter(
    "MeanFlow, JVP on a quarter, compiled", partial(meanflow.by_tangents, compiled=True), compiled=True
)
FLASH = on_a_quarter(
    "MeanFlow, jvp-flash-attention on a quarter, compiled",
    partial(meanflow.by_tangents, compiled=True, attention=dual.flash),
    TF32_TOLERANCE,
    compiled=True,
)._replace(why_not=why_no_flash_jvp, counted_as=QUARTER)
DIFFERENCE = on_a_quarter("MeanFlow, finite difference", meanflow.by_difference, None, taped=False)
DIFFERENCE_COMPILED = on_a_quarter(
    "MeanFlow, finite difference, compiled", meanflow.by_difference, None, taped=False, compiled=True
)._replace(why_not=why_no_compiled_difference)

TIM = central_difference("MeanFlow, central difference in bf16 as TiM's")
TIM_COMPILED = central_difference("MeanFlow, central difference in bf16 as TiM's, compiled", compiled=True)

AGAIN = OURS._replace(name="soflow-fast, once more", why_not=why_not_again)
"""Ours where recipes are timed one after the other: how much the machine has changed since the first."""
CONTESTANTS = [
    OURS,
    AS_TRAINED,
    LOW_GUIDANCE,
    *VARIANTS,
    AUTHORS,
    *COMPILED,
    *PAIRED,
    MEANFLOW,
    QUARTER,
    QUARTER_COMPILED,
    FLASH,
    DIFFERENCE,
    DIFFERENCE_COMPILED,
    TIM,
    TIM_COMPILED,
    AGAIN,
]
FIRST = [OURS, AS_TRAINED, COMPILED[0]]
"""The recipes that answer whether ours is the fastest, most worth first."""
HEADLINE = [*FIRST, MEANFLOW, PAIRED[1], QUARTER, LOW_GUIDANCE, AUTHORS, PAIRED[0], TIM, AGAIN]
"""The recipes that say most where time is short, most worth first: compiling the others takes most of a race."""
