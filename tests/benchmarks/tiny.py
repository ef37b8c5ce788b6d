"""A network and operations that cost nothing, and steps that are wrong on purpose."""

from dataclasses import replace

import torch

from benchmarks.harness.cases import Case
from benchmarks.harness.operations import Sizes, operations
from benchmarks.harness.recipes import Recipe, Step
from soflow_fast.config.schema import Config, DataConfig, DiTConfig, RunConfig, override

CPU = torch.device("cpu")
CONFIG = Config(
    model=DiTConfig(input_size=4, patch_size=2, in_channels=2, hidden_size=16, depth=2, num_heads=2, num_classes=3),
    data=DataConfig(kind="latents"),
    run=RunConfig(device="cpu"),
    batch_size=8,
)
CASE = Case("tiny", CONFIG)
SIZES = Sizes(samples=4, tokens=4, width=16, heads=2, blocks=1)
OPERATIONS = {op.name: op for op in operations(CPU)}


def with_objective(step: Step, precision: str | None = None, **changes: float) -> Step:
    """A step under another objective than its state's; precision: only where the state is in it."""

    def changed(state, x0, y, **told):
        kept = state.objective
        if precision in (None, state.precision):
            state.objective = type(kept)(replace(kept.config, **changes))
        try:
            return step(state, x0, y, **told)
        finally:
            state.objective = kept

    return changed


def with_settings(recipe: Recipe, changes: dict[str, object]) -> Recipe:
    """A recipe whose step computes under another configuration than its state's."""

    def step(state, x0, y, **told):
        kept = state.config, state.objective
        state.config = override(state.config, changes)
        state.objective = type(state.objective)(state.config.objective)
        try:
            return recipe.step(state, x0, y, **told)
        finally:
            state.config, state.objective = kept

    return recipe._replace(step=step)
