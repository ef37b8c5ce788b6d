"""The recipes that take part in the race, ours first."""

from functools import partial

from benchmarks.baselines import dual, meanflow
from benchmarks.baselines.authors import AUTHORS, COMPILED
from benchmarks.baselines.meanflow import Derivative, Settings, jvp
from benchmarks.correctness.meanflow import DERIVATIVE_TOLERANCE, TF32_TOLERANCE, check
from benchmarks.harness.recipes import OURS, VARIANTS, Recipe, why_no_compiler
from soflow_fast.config.schema import Config
from soflow_fast.training.precision import resolve_device

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


def why_no_compiled_difference(config: Config) -> str | None:
    """Why the finite difference is not compiled."""
    if resolve_device(config.run.device).type == "cpu":
        return "left out on a CPU, where compiling takes most of the benchmarks' time"
    return why_no_compiler(config)


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

GRAPH = next(recipe for recipe in VARIANTS if recipe.name == "soflow-fast, CUDA graph")
CONTESTANTS = [
    OURS,
    *VARIANTS,
    AUTHORS,
    *COMPILED,
    MEANFLOW,
    QUARTER,
    QUARTER_COMPILED,
    FLASH,
    DIFFERENCE,
    DIFFERENCE_COMPILED,
]
HEADLINE = [OURS, GRAPH, AUTHORS, COMPILED[0], MEANFLOW, QUARTER]
"""The recipes that say most where time is short: compiling the others takes most of a race."""
