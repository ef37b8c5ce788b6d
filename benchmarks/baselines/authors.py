"""The authors' public training recipe (arXiv 2512.15657; zlab-princeton/SoFlow, train.py and models.py), written anew.

Imitated of it, on one device:

* float32 weights and activations, TF32 products on a GPU, no autocast, no compilation, plain PyTorch operations;
* each loss makes its own network calls on its own slice of the batch, six in all with mixed guidance. Flow matching:
  unlabelled without gradient, student with gradient. Consistency: unlabelled and labelled without gradient, student
  with gradient, look-ahead without gradient. One backward through the weighted sum of both losses;
* memory-efficient attention only, on a GPU;
* torch.optim.AdamW with its defaults: not fused, one parameter at a time on a CPU, `foreach` on a GPU;
* the gradient norm and the EMA in Python loops over the parameters.

Left out, in its favour: DistributedDataParallel, the data loader's copies, logging. The network, the objective's
formulas and the random draws are the engine's, so both recipes compute the same numbers.

`compiled` is the same recipe with what PyTorch itself offers to make it fast, and nothing of the method changed: bf16
autocast on a GPU, compiled blocks, any attention of torch, fused AdamW, EMA and gradient norm by `foreach`. Its six
calls remain, and so does its quotient of two bf16 values, which docs/precision.md says does not learn as well.
"""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.baselines import fused
from benchmarks.harness.recipes import Observe, Recipe, Weights, plain_operations, why_no_compiler
from soflow_fast.config.schema import Config
from soflow_fast.objective import Objective
from soflow_fast.training.precision import matmul_precision, resolve_device
from soflow_fast.training.state import TrainState
from soflow_fast.training.step import draw, ema_decay, learning_rate


def build(config: Config, weights: Weights | None = None) -> TrainState:
    """A training state with the authors' optimiser; products in TF32 on a GPU, unless the configuration says "fp32"."""
    on_gpu = resolve_device(config.run.device).type == "cuda"
    precision = "tf32" if on_gpu and config.precision != "fp32" else "fp32"
    state = TrainState.build(replace(config, precision=precision), weights=weights)
    state.flow.network.keep_norms = True  # autograd keeps the input of every product
    optim = config.optim
    state.optimizer = torch.optim.AdamW(  # pyright: ignore[reportAttributeAccessIssue]
        state.flow.parameters(), lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
    )
    return state


def train_step(state: TrainState, x0: Tensor, y: Tensor, *, observe: Observe | None = None) -> dict[str, Tensor]:
    """One whole update on a labelled batch x0 [B, C, H, W], y [B]; returns both mean squares and the gradient norm."""
    attention = sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION) if x0.is_cuda else contextlib.nullcontext()
    with plain_operations(), matmul_precision(state.precision, state.device), attention:
        metrics = _losses_and_gradients(state, x0, y, observe)
    metrics["grad_norm"] = _update(state)
    state.step += 1
    return metrics


def _losses_and_gradients(state: TrainState, x0: Tensor, y: Tensor, observe: Observe | None) -> dict[str, Tensor]:
    flow, objective, B = state.flow, state.objective, len(x0)
    x1, t, l, s, dropped, n = draw(state, x0.shape)
    metrics: dict[str, Tensor] = {}
    loss = torch.zeros((), device=x0.device)
    if n > 0:
        term = objective.flow_matching(flow, x0[:n], x1[:n], t[:n], y[:n], dropped[:n])
        loss, metrics["fm_mse"] = loss + term.loss * (n / B), term.mse
    if n < B:
        term = objective.consistency(flow, x0[n:], x1[n:], t[n:], l[n:], s[n:], y[n:], dropped[n:])
        loss, metrics["sc_mse"] = loss + term.loss * ((B - n) / B), term.mse
    if observe is not None:
        observe("losses", total=loss.detach())
    state.optimizer.zero_grad()
    loss.backward()
    return metrics


def _update(state: TrainState) -> Tensor:
    total = torch.zeros(1, device=state.device)
    for parameter in state.flow.parameters():
        if parameter.grad is not None:
            total += parameter.grad.pow(2).sum()
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(state)
    state.optimizer.step()
    decay = ema_decay(state)
    with torch.no_grad():
        for average, parameter in zip(state.ema.parameters(), state.flow.parameters(), strict=True):
            average.mul_(decay).add_(parameter, alpha=1 - decay)
    return total.sqrt().squeeze()


def network_calls(objective: Objective) -> int:
    """Six with mixed guidance; five where the mix is 1 (the labelled call has no use), three without guidance."""
    return 3 + 2 * objective.guided + objective.mixed


AUTHORS = Recipe("authors' recipe", build, train_step, network_calls)


def build_compiled(config: Config, weights: Weights | None = None, *, mix_order: bool) -> TrainState:
    """A training state for compiled blocks, with Inductor's mix-order reduction or without."""
    state = fused.build(config, weights)
    fused.compile_blocks(state.flow.network, mix_order)
    return state


def train_step_fused(state: TrainState, x0: Tensor, y: Tensor, *, observe: Observe | None = None) -> dict[str, Tensor]:
    """`train_step` with any attention of torch, and the update by fused operations."""
    with plain_operations(), matmul_precision(state.precision, state.device):
        metrics = _losses_and_gradients(state, x0, y, observe)
    metrics["grad_norm"] = fused.update(state)
    state.step += 1
    return metrics


def why_no_mix_order(config: Config) -> str | None:
    """Why there is no mix-order reduction to turn off: it is one of Inductor's Triton code."""
    if resolve_device(config.run.device).type != "cuda":
        return "Inductor's mix-order reduction is for GPUs"
    return None if fused.has_mix_order() else "this Inductor has no mix-order reduction"


def compiled(name: str, mix_order: bool, why_not: Callable[[Config], str | None]) -> Recipe:
    """The authors' recipe as PyTorch can make it fast."""
    build = partial(build_compiled, mix_order=mix_order)
    return Recipe(name, build, train_step_fused, network_calls, why_not, compiled=True)


COMPILED = [
    compiled("authors' recipe, compiled", True, why_no_compiler),
    compiled("authors' recipe, compiled, no mix-order reduction", False, why_no_mix_order),
]
