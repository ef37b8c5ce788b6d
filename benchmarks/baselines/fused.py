"""Parts of the fast baselines: torch's fused AdamW, averages and gradient norm by `foreach`, compiled blocks."""

import functools
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from soflow_fast.config.schema import Config
from soflow_fast.models.dit import DiT
from soflow_fast.training.state import TrainState
from soflow_fast.training.step import ema_decay, learning_rate, teacher_decay

MIX_ORDER = "triton.mix_order_reduction"
"""An option of Inductor that torch 2.10 to 2.13 have."""


def build(config: Config, weights: Mapping[str, Tensor] | None = None, **changes: Any) -> TrainState:
    """A state for plain operations: autograd keeps the input of every product, torch's fused AdamW updates.

    In bf16 the parameters of the blocks are bf16 themselves with float32 masters, where autocast alone would cast
    float32 parameters in each of a step's autocast regions. weights: initial ones, None: those of the configuration's
    seed. `changes`: fields of the configuration to replace.
    """
    run = replace(config.run, optimizer="torch", compile=False, cuda_graph=False)
    state = TrainState.build(replace(config, run=run, **changes), weights=weights)
    state.flow.network.keep_norms = True
    state.sum_gradients_in(torch.float32)  # as the fused AdamW takes those of its masters
    return state


@torch.no_grad()
def update(state: TrainState) -> Tensor:
    """AdamW and the averages of the weights, from gradients that are there. Returns the gradient norm."""
    gradients = [p.grad for p in state.flow.parameters() if p.grad is not None]
    norm = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).norm()
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(state)
    decays = [ema_decay(state)] if state.teacher is None else [ema_decay(state), teacher_decay(state)]
    for place, decay in zip(state.optimizer.ema_decays, decays, strict=True):
        place.fill_(decay)
    state.optimizer.step()
    return norm


def finish(state: TrainState, total: Tensor, observe: Callable[..., None] | None, **means: Tensor) -> dict[str, Tensor]:
    """The end of a step: the backward of its loss, and the update. Returns `means` with the gradient norm."""
    if observe is not None:
        observe("losses", total=total.detach())
    state.optimizer.zero_grad(set_to_none=True)
    total.backward()
    metrics = {**means, "grad_norm": update(state)}
    state.step += 1
    return metrics


def no_compiler(device: torch.device) -> str | None:
    """Why torch.compile cannot make code for a device, None: it can."""
    if device.type == "cpu" and shutil.which("g++") is None and shutil.which("clang++") is None:
        return "no C++ compiler"
    return None


def compile_blocks(network: DiT, mix_order: bool | None = None) -> None:
    """Compile the blocks, each without a break, for the sizes of batch that come.

    By blocks and not as a whole: a block begins with the gated sum that its predecessor left open, so nothing is left
    to fuse across its edge, and equal blocks share their code, of which a step needs several variants.
    mix_order: Inductor's mix-order reduction on or off; None, or an Inductor that has no such thing: as it comes.
    """
    network.compile_blocks(_inductor(mix_order if has_mix_order() else None))


@functools.cache
def _inductor(mix_order: bool | None) -> Callable[..., Any]:
    """Inductor with one choice of its own: a backend each and no setting of the process, so that code for one choice,
    or that of the engine's kernels, is not taken for another."""
    from torch._inductor.compile_fx import compile_fx

    return functools.partial(compile_fx, config_patches={} if mix_order is None else {MIX_ORDER: mix_order})


def has_mix_order() -> bool:
    """Whether this Inductor has a mix-order reduction to turn off."""
    import torch._inductor.config as inductor

    return hasattr(inductor.triton, MIX_ORDER.removeprefix("triton."))
