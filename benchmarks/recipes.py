"""What a race is between: recipes, each a way to build a training state and to make one step of it; and ours."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks.baselines import fused
from soflow_fast.config.schema import Config, override
from soflow_fast.errors import ConfigError
from soflow_fast.models import float8
from soflow_fast.models.dit import DiT, DiTConfig
from soflow_fast.objective import Objective
from soflow_fast.rng import generator
from soflow_fast.training.state import TrainState, resolve_device, resolve_precision
from soflow_fast.training.step import train_step
from soflow_kernels import testing


class Recipe(NamedTuple):
    """One contestant."""

    name: str
    build: Callable[[Config], TrainState]
    step: Callable[[TrainState, Tensor, Tensor], dict[str, Tensor]]
    """One whole update on a labelled batch; returns at least fm_mse, sc_mse and grad_norm."""
    network_calls: Callable[[Objective], int]
    """How many calls of the network a step is meant to make in float32, on labelled data."""
    why_not: Callable[[Config], str | None] = lambda config: None
    """Why it cannot run here, None: it can."""
    gate: Callable[[Config, Any], dict[str, float]] | None = None
    """(config, recipe) -> relative errors by name; raises RedGate. None: `gates.check`, against ours."""
    compiled: bool = False
    """Whether torch.compile makes code for its size of batch, so that the gate had better take the one to be timed."""
    coarse: bool = False
    """Whether it multiplies in float8, and cannot be held to float32."""
    gate_steps: int = 1
    """How many steps the gate and the warm-up make: one that records a CUDA graph has to get to where it replays it."""
    counted_as: Any = None
    """A recipe of the same products, where a counter cannot see into this one."""


def build(recipe: Recipe, config: Config) -> TrainState:
    """The recipe's state at step 0, with N(0, 0.02) added to all weights.

    At the public initialisation the output layers are zero, and so are nearly all gradients: nothing to compare.
    """
    weights = _weights(config.model, config.seed)
    with mock.patch.object(DiT, "initialize", lambda network, source=None: _load(network, weights)):
        return recipe.build(config)


@functools.lru_cache(maxsize=1)
@torch.no_grad()
def _weights(model: DiTConfig, seed: int) -> dict[str, Tensor]:
    """On the CPU. Made once for all the states of a race, as numbers for hundreds of millions of weights take long."""
    network = DiT(model)
    network.initialize(generator(seed, 0, 0, "initialisation"))
    source = generator(seed, 0, 0, "benchmark weights")
    for parameter in network.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=source), alpha=0.02)
    return network.state_dict()


def _load(network: DiT, weights: dict[str, Tensor]) -> None:
    if not network.pos_embed.is_meta:  # a network without numbers has not yet been asked for them
        network.load_state_dict(weights)


def plain_operations() -> contextlib.AbstractContextManager[None]:
    """Within the context the kernels' plain PyTorch twins run, on every device."""
    return testing.mode("reference")


def ours(name: str, why_not: Callable[[Config], str | None] = lambda config: None, **changes: Any) -> Recipe:
    """The engine's step with some fields of its configuration replaced."""
    named = {field.replace("__", "."): value for field, value in changes.items()}
    return Recipe(
        name,
        lambda config: TrainState.build(override(config, named)),
        train_step,
        lambda objective: 3 if objective.guided else 2,
        why_not,
        compiled="run.compile" in named,
        coarse=named.get("precision") == "fp8",
        gate_steps=5 if "run.cuda_graph" in named else 1,
    )


def why_no_compiler(config: Config) -> str | None:
    """Why nothing can be compiled."""
    return fused.no_compiler(resolve_device(config.run.device))


def why_no_graph(config: Config) -> str | None:
    """Why no CUDA graph can be recorded."""
    return None if resolve_device(config.run.device).type == "cuda" else "CUDA graphs need a GPU"


def why_no_float8(config: Config) -> str | None:
    """Why there is no float8."""
    try:
        float8.require(config.model, resolve_device(config.run.device))
    except ConfigError as error:
        return str(error)
    return None


def why_no_other_pair(config: Config) -> str | None:
    """Why a float32 pair is no choice of its own."""
    precise = resolve_precision(config.precision, resolve_device(config.run.device)) == "fp32"
    return "in float32 the quotient is a float32 pair in any case" if precise else None


OURS = ours("soflow-fast")
VARIANTS = [
    ours("soflow-fast, float32 pair", why_no_other_pair, quotient="pair", quotient_precision="fp32"),
    ours("soflow-fast, compiled", why_no_compiler, run__compile=True),
    ours("soflow-fast, CUDA graph", why_no_graph, run__cuda_graph=True),
    ours("soflow-fast, compiled, CUDA graph", why_no_graph, run__compile=True, run__cuda_graph=True),
    ours("soflow-fast, fp8, compiled", why_no_float8, precision="fp8", run__compile=True),
]
