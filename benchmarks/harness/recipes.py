"""Recipes: each is a way to build a training state and to make one step of it. Ours is here, with its variants."""

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from benchmarks.baselines import fused
from soflow_fast.config.schema import Config, DiTConfig, override
from soflow_fast.errors import ConfigError
from soflow_fast.flow import SolutionFlow
from soflow_fast.models import float8
from soflow_fast.objective import Objective
from soflow_fast.rng import generator
from soflow_fast.runs import trainer
from soflow_fast.training import state as engine
from soflow_fast.training.precision import resolve_device, resolve_precision
from soflow_fast.training.state import TrainState, build_flow
from soflow_fast.training.step import train_step
from soflow_kernels import testing

Weights = Mapping[str, Tensor]
"""Initial weights in float32, under the names of a flow's state_dict."""
Observe = Callable[..., None]
"""(name, **tensors): is told what a step computes on the way, as `soflow_fast.train_step` tells it."""


class Build(Protocol):
    """Makes a training state at step 0, with the weights of the configuration's seed or with given ones."""

    def __call__(self, config: Config, weights: Weights | None = None) -> TrainState: ...


class Step(Protocol):
    """One whole update on a labelled batch x0 [B, C, H, W], y [B]; returns at least fm_mse, sc_mse and grad_norm."""

    def __call__(
        self, state: TrainState, x0: Tensor, y: Tensor, *, observe: Observe | None = None
    ) -> dict[str, Tensor]: ...


class Recipe(NamedTuple):
    """One contestant."""

    name: str
    build: Build
    step: Step
    network_calls: Callable[[Objective], int]
    """How many calls of the network a step is meant to make in float32, on labelled data."""
    why_not: Callable[[Config], str | None] = lambda config: None
    """Why it cannot run here, None: it can."""
    check: Callable[[Config, Any], dict[str, float]] | None = None
    """(config, recipe) -> relative errors by name; raises IncorrectResult. None: `correctness.step.check`, against
    ours."""
    compiled: bool = False
    """Whether torch.compile makes code for its size of batch, so that the check had better take the one to be timed."""
    coarse: bool = False
    """Whether it multiplies in float8, and cannot be held to float32."""
    checked_steps: int = 1
    """Steps of the check and of the warm-up: a recipe that records a CUDA graph has to get to where it replays it."""
    counted_as: Any = None
    """A recipe of the same products, where a counter cannot see into this one."""


def build(recipe: Recipe, config: Config) -> TrainState:
    """The recipe's state at step 0, with `initial_weights`."""
    return recipe.build(config, weights=initial_weights(config.model, config.seed))


def initial_flow(config: Config, device: torch.device, dtype: torch.dtype = torch.float32) -> SolutionFlow:
    """A flow with `initial_weights`, for a check that computes by itself."""
    flow = build_flow(config).to_empty(device=device).to(dtype)
    flow.load_state_dict(initial_weights(config.model, config.seed))
    return flow


@functools.lru_cache(maxsize=4)
@torch.no_grad()
def initial_weights(model: DiTConfig, seed: int) -> dict[str, Tensor]:
    """The public initialisation with N(0, 0.02) added to all weights, on the CPU.

    As it is, the output layers are zero, and so are nearly all gradients: nothing to compare. Made once for all the
    states of a race, as numbers for hundreds of millions of weights take long; four are kept: two networks, and each at
    the depth of its checks.
    """
    config = Config(model=model, seed=seed)
    weights = engine.initial_weights(config)
    source = generator(seed, 0, 0, "benchmark weights")
    buffers = {name for name, _ in build_flow(config).named_buffers()}
    for name in sorted(weights.keys() - buffers):
        weights[name].add_(torch.randn(weights[name].shape, generator=source), alpha=0.02)
    return weights


def plain_operations() -> contextlib.AbstractContextManager[None]:
    """Within the context the kernels' plain PyTorch references run, on every device."""
    return testing.mode("reference")


def ours(name: str, why_not: Callable[[Config], str | None] = lambda config: None, **changes: Any) -> Recipe:
    """The engine's step with some fields of its configuration replaced; a CUDA graph only where they say so."""
    named = {"run.cuda_graph": False} | {field.replace("__", "."): value for field, value in changes.items()}
    return Recipe(
        name,
        lambda config, weights=None: TrainState.build(override(config, named), weights=weights),
        train_step,
        lambda objective: 3 if objective.guided else 2,
        why_not,
        compiled="run.compile" in named,
        coarse=named.get("precision") == "fp8",
        checked_steps=5 if named["run.cuda_graph"] else 1,
    )


def build_as_trained(config: Config, weights: Weights | None = None) -> TrainState:
    """The engine's state as `python -m soflow_fast.train` has it on this GPU: a CUDA graph, with room for what the
    backward would make again, and the attention and the MLPs that are fastest here."""
    config = trainer.resolved(override(config, {"run.cuda_graph": None}))
    state = TrainState.build(config, weights=weights)
    state.set_attention(trainer.resolve_attention(state))
    trainer.set_mlp(state, trainer.resolve_mlp(state).name)
    return state


def build_with_low_guidance(config: Config, weights: Weights | None = None) -> TrainState:
    """The same, with the forward behind guidance in float8."""
    return build_as_trained(override(config, {"guidance_precision": "fp8"}), weights)


def why_no_compiler(config: Config) -> str | None:
    """Why nothing can be compiled."""
    return fused.no_compiler(resolve_device(config.run.device))


def why_no_graph(config: Config) -> str | None:
    """Why no CUDA graph can be recorded."""
    return None if resolve_device(config.run.device).type == "cuda" else "CUDA graphs need a GPU"


def why_nothing_is_kept(config: Config) -> str | None:
    """Why keeping norms and GELUs is no choice of its own."""
    on_gpu = resolve_device(config.run.device).type == "cuda"
    return None if on_gpu else "a CPU keeps norms and GELUs as it is"


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
AS_TRAINED = ours("soflow-fast, as train runs it", why_no_graph)._replace(build=build_as_trained, checked_steps=5)
LOW_GUIDANCE = ours("soflow-fast, as train runs it, guidance in fp8", why_no_float8)._replace(
    build=build_with_low_guidance, checked_steps=5, coarse=True
)
VARIANTS = [
    ours("soflow-fast, float32 pair", why_no_other_pair, quotient="pair", quotient_precision="fp32"),
    ours("soflow-fast, nothing made again", why_nothing_is_kept, run__recompute="nothing"),
    ours("soflow-fast, compiled", why_no_compiler, run__compile=True),
    ours("soflow-fast, CUDA graph", why_no_graph, run__cuda_graph=True),
    ours("soflow-fast, compiled, CUDA graph", why_no_graph, run__compile=True, run__cuda_graph=True),
    ours("soflow-fast, fp8, compiled", why_no_float8, precision="fp8", run__compile=True),
]
