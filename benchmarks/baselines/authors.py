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

`PAIRED` is that once more with a quotient that does: both values behind it come from forwards in float32, or in TF32,
whose error docs/precision.md shows as that of float16. The student's own value is one of bf16, so both ends are calls.
"""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.baselines import fused
from benchmarks.harness.recipes import Observe, Recipe, Weights, plain_operations, why_no_compiler
from soflow_fast.config.schema import Config
from soflow_fast.objective import ConsistencyPoints, LossTerm, Objective, with_null
from soflow_fast.training.consistency_target import ConsistencyTarget, value_and_increment
from soflow_fast.training.precision import matmul_precision, resolve_device, resolve_precision
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


Consistency = Callable[..., LossTerm]
"""(state, x0, x1, t, l, s, y, label_dropped) -> the consistency loss of these samples."""


def published(state: TrainState, *samples: Any) -> LossTerm:
    """Both values of the quotient in the precision of the step."""
    return state.objective.consistency(state.flow, *samples)


def of_pair(
    state: TrainState,
    x0: Tensor,
    x1: Tensor,
    t: Tensor,
    l: Tensor,
    s: Tensor,
    y: Tensor,
    label_dropped: Tensor,
    *,
    precision: str,
) -> LossTerm:
    """Both values of the quotient by forwards in a precision of their own, that of the step if that is float32: then
    the student's value is one of them."""
    precision = "fp32" if state.precision == "fp32" else precision
    flow, objective = state.flow, state.objective
    x_t, v_t = flow.point(x0, x1, t)
    label = with_null(flow, y, label_dropped)
    with torch.no_grad():
        v_null = flow.velocity(x_t, t, None) if objective.guided else None
        v_label = flow.velocity(x_t, t, label) if objective.mixed else None
        velocity, dx, x_l = objective.look_ahead(x_t, v_t, t, l, v_null, v_label, label_dropped)
    output = flow.network(x_t, t, s, label).float()
    at = ConsistencyPoints(x_t, velocity, dx, x_l, t, l, s, label)
    known = output if state.precision == precision else None
    value, increment = value_and_increment(ConsistencyTarget("pair", precision, "student"), flow, None, at, known)
    return objective.consistency_term(flow, output, at, value, increment)


def train_step(state: TrainState, x0: Tensor, y: Tensor, *, observe: Observe | None = None) -> dict[str, Tensor]:
    """One whole update on a labelled batch x0 [B, C, H, W], y [B]; returns both mean squares and the gradient norm."""
    attention = sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION) if x0.is_cuda else contextlib.nullcontext()
    with plain_operations(), matmul_precision(state.precision, state.device), attention:
        metrics = _losses_and_gradients(state, x0, y, observe)
    metrics["grad_norm"] = _update(state)
    state.step += 1
    return metrics


def _losses_and_gradients(
    state: TrainState, x0: Tensor, y: Tensor, observe: Observe | None, consistency: Consistency = published
) -> dict[str, Tensor]:
    flow, objective, B = state.flow, state.objective, len(x0)
    x1, t, l, s, dropped, n = draw(state, x0.shape)[:6]
    metrics: dict[str, Tensor] = {}
    loss = torch.zeros((), device=x0.device)
    if n > 0:
        term = objective.flow_matching(flow, x0[:n], x1[:n], t[:n], y[:n], dropped[:n])
        loss, metrics["fm_mse"] = loss + term.loss * (n / B), term.mse
    if n < B:
        term = consistency(state, x0[n:], x1[n:], t[n:], l[n:], s[n:], y[n:], dropped[n:])
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


def train_step_fused(
    state: TrainState,
    x0: Tensor,
    y: Tensor,
    *,
    observe: Observe | None = None,
    consistency: Consistency = published,
) -> dict[str, Tensor]:
    """`train_step` with any attention of torch, and the update by fused operations."""
    state.optimizer.zero_grad()  # no float32 gradient of a bf16 parameter is there while code is compiled
    with plain_operations(), matmul_precision(state.precision, state.device):
        metrics = _losses_and_gradients(state, x0, y, observe, consistency)
    metrics["grad_norm"] = fused.update(state)
    state.step += 1
    return metrics


def why_no_mix_order(config: Config) -> str | None:
    """Why there is no mix-order reduction to turn off: it is one of Inductor's Triton code."""
    if resolve_device(config.run.device).type != "cuda":
        return "Inductor's mix-order reduction is for GPUs"
    return None if fused.has_mix_order() else "this Inductor has no mix-order reduction"


def why_no_pair(precision: str, config: Config) -> str | None:
    """Why there is no pair in a precision of its own."""
    device = resolve_device(config.run.device)
    if resolve_precision(config.precision, device) == "fp32":
        return "in float32 its quotient is a float32 pair in any case"
    if precision == "tf32" and device.type != "cuda":
        return "TF32 needs a GPU"
    return why_no_compiler(config)


def compiled(
    name: str, mix_order: bool, why_not: Callable[[Config], str | None], consistency: Consistency = published
) -> Recipe:
    """The authors' recipe as PyTorch can make it fast."""
    build, step = partial(build_compiled, mix_order=mix_order), partial(train_step_fused, consistency=consistency)
    return Recipe(name, build, step, network_calls, why_not, compiled=True)


COMPILED = [
    compiled("authors' recipe, compiled", True, why_no_compiler),
    compiled("authors' recipe, compiled, no mix-order reduction", False, why_no_mix_order),
]
PAIRED = [
    compiled(
        f"authors' recipe, compiled, {name} pair", True, partial(why_no_pair, key), partial(of_pair, precision=key)
    )
    for key, name in (("fp32", "float32"), ("tf32", "TF32"))
]
