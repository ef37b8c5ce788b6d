"""What the fast baselines share: torch's fused AdamW, averages and gradient norm by `foreach`, compiled blocks."""

import shutil
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from soflow_fast.config.schema import Config
from soflow_fast.models.dit import DiT
from soflow_fast.training.state import TrainState
from soflow_fast.training.step import ema_decay, learning_rate

MIX_ORDER = "triton.mix_order_reduction"
"""An option of Inductor that torch 2.10 to 2.13 have."""


def build(config: Config, **changes: Any) -> TrainState:
    """A state for plain operations: autograd keeps the input of every product, torch's fused AdamW updates.

    In bf16 the products take copies of the weights that are made once a step, which autocast by itself would make once
    for each of a step's autocast regions. `changes`: fields of the configuration to replace.
    """
    run = replace(config.run, optimizer="torch", compile=False, cuda_graph=False)
    state = TrainState.build(replace(config, run=run, **changes))
    state.flow.network.keep_norms = True
    state.sum_gradients_in(torch.float32)  # the fused AdamW takes gradients of the weights' dtype
    return state


@torch.no_grad()
def update(state: TrainState) -> Tensor:
    """AdamW and the average of the weights, from gradients that are there. Returns the gradient norm."""
    gradients = [p.grad for p in state.flow.parameters() if p.grad is not None]
    norm = torch.stack(torch._foreach_norm(gradients, 2)).norm()
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(state)
    state.optimizer.ema_decays[0].fill_(ema_decay(state))
    state.optimizer.step()
    for layer in state.flow.network.copied_layers():
        layer.copy.forget()
    return norm


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
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, 64)
    options = {} if mix_order is None or not has_mix_order() else {MIX_ORDER: mix_order}
    for block in network.blocks:
        # Options, not a setting of the process: code for one choice must not be taken for the other.
        block.compile(options=options, fullgraph=True, dynamic=False)


def has_mix_order() -> bool:
    """Whether this Inductor has a mix-order reduction to turn off."""
    import torch._inductor.config as inductor

    return hasattr(inductor.triton, MIX_ORDER.removeprefix("triton."))
