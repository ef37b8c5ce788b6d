"""What a race is between: recipes, each a way to build a training state and to make one step of it."""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from soflow_fast.config import Config
from soflow_fast.objective import Objective
from soflow_fast.rng import generator
from soflow_fast.state import TrainState
from soflow_fast.step import train_step
from soflow_kernels import testing


class Recipe(NamedTuple):
    """One contestant."""

    name: str
    build: Callable[[Config], TrainState]
    step: Callable[[TrainState, Tensor, Tensor], dict[str, Tensor]]
    """One whole update on a labelled batch; returns at least fm_mse, sc_mse and grad_norm."""
    network_calls: Callable[[Objective], int]
    """How many calls of the network a step is meant to make, on labelled data."""


OURS = Recipe("soflow-fast", TrainState.build, train_step, lambda objective: 3 if objective.guided else 2)


@torch.no_grad()
def build(recipe: Recipe, config: Config) -> TrainState:
    """The recipe's state at step 0, with N(0, 0.02) added to all weights.

    At the public initialisation the output layers are zero, and so are nearly all gradients: nothing to compare.
    """
    state = recipe.build(config)
    source = generator(config.seed, 0, 0, "benchmark weights")
    for parameter in state.flow.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=source).to(parameter.device), alpha=0.02)
    state.ema.load_state_dict(state.flow.state_dict())
    return state


def plain_operations() -> contextlib.AbstractContextManager[None]:
    """Within the context the kernels' plain PyTorch twins run, on every device."""
    return testing.mode("reference")
