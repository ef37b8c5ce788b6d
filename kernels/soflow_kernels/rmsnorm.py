"""RMSNorm and adaLN-Zero modulation, alone and behind the gated residual sum: what blocks have that replace LayerNorm
(LightningDiT, arXiv 2501.01423, table 6; RMSNorm: arXiv 1910.07467).

    rmsnorm_modulate                  out = RMS(x) weight (1 + scale) + shift
    gate_residual_rmsnorm_modulate    x' = x + gate y;  out = RMS(x') weight (1 + scale) + shift

RMS(x) = x / sqrt(mean(x^2) + eps) over the last dimension. x, y, x', out: [B, T, D]; gate, shift, scale: [B, D];
weight: [D] or None. Backward, with u = dout weight (1 + scale), h = RMS(x'), c = mean(u h) over D, dsum the gradient
of x', and dfactor = sum_t dout h:

    dx = rstd (u - h c) + dsum     dy = gate dx     dgate = sum_t dx y
    dshift = sum_t dout            dscale = weight dfactor            dweight = sum_b (1 + scale) dfactor

The kernels are those of `adaln`, without the mean: the same layout, passes and partial sums. The weight is one row that
a program multiplies into the scale it holds, and its gradient falls out of the scale's. Bytes, with S = one pass over
[B, T, D]: forward 2 S and 4 S, backward 3 S and 6 S. Kept for the backward: x', y and rstd.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from soflow_kernels._dispatch import operation, use_kernel
from soflow_kernels.adaln import MAX_D, _backward, _check, _forward, _modulated
from soflow_kernels.gated_residual import gate_residual_reference


def rmsnorm_modulate_reference(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None = None, eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """`rmsnorm_modulate` in plain PyTorch: any device and dtype, any order of differentiation."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return _modulated(normed if weight is None else normed * weight, shift, scale, out_dtype or x.dtype)


def gate_residual_rmsnorm_modulate_reference(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None = None, eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`gate_residual_rmsnorm_modulate` in plain PyTorch: any device and dtype, any order of differentiation."""
    x = gate_residual_reference(x, y, gate)
    return x, rmsnorm_modulate_reference(x, shift, scale, weight, eps, out_dtype)


def _factor_gradients(dfactor: Tensor, scale: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """(dscale, dweight) from the gradient [B, D] of weight (1 + scale), in float32; dweight empty without a weight."""
    if weight is None:
        return dfactor, dfactor.new_empty(0)
    return (dfactor * weight).to(scale.dtype), (dfactor * (1 + scale.float())).sum(0).to(weight.dtype)


@operation("soflow::rmsnorm_modulate")
def _rmsnorm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, eps: float, out_dtype: torch.dtype, stats: bool
) -> tuple[Tensor, Tensor]:
    _, out, _, rstd = _forward(x, None, None, shift, scale, None, eps, out_dtype, stats, centred=False, weight=weight)
    return out, rstd


@_rmsnorm_modulate.register_fake
def _(x, shift, scale, weight, eps, out_dtype, stats):
    return x.new_empty(x.shape, dtype=out_dtype), x.new_empty(x.shape[:2] if stats else 0, dtype=torch.float32)


@operation("soflow::rmsnorm_modulate_backward")
def _rmsnorm_modulate_backward(
    dout: Tensor, x: Tensor, scale: Tensor, weight: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, _, _, (dshift, dfactor) = _backward(dout, None, x, None, None, scale, None, None, rstd, weight=weight)
    return dx, dshift, *_factor_gradients(dfactor, scale, weight)


@_rmsnorm_modulate_backward.register_fake
def _(dout, x, scale, weight, rstd):
    dweight = scale.new_empty(0) if weight is None else weight.new_empty(weight.shape)
    return x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape), dweight


@operation("soflow::gate_residual_rmsnorm_modulate")
def _gate_residual_rmsnorm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    total, out, _, rstd = _forward(x, y, gate, shift, scale, None, eps, out_dtype, stats, centred=False, weight=weight)
    return total, out, rstd


@_gate_residual_rmsnorm_modulate.register_fake
def _(x, y, gate, shift, scale, weight, eps, out_dtype, stats):
    rstd = x.new_empty(x.shape[:2] if stats else 0, dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=out_dtype), rstd


@operation("soflow::gate_residual_rmsnorm_modulate_backward")
def _gate_residual_rmsnorm_modulate_backward(
    dout: Tensor, dsum: Tensor | None, x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, weight: Tensor | None,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx, dy, _, sums = _backward(dout, dsum, x, y, gate, scale, None, None, rstd, weight=weight)
    dshift, dfactor, dgate = sums
    return dx, dy, dgate, dshift, *_factor_gradients(dfactor, scale, weight)


@_gate_residual_rmsnorm_modulate_backward.register_fake
def _(dout, dsum, x, y, gate, scale, weight, rstd):
    dgate, dshift, dscale = (m.new_empty(m.shape) for m in (gate, scale, scale))
    dweight = scale.new_empty(0) if weight is None else weight.new_empty(weight.shape)
    return x.new_empty(x.shape), y.new_empty(y.shape), dgate, dshift, dscale, dweight


def _save_rmsnorm_modulate(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, shift, scale, weight, _, _, _ = inputs
    ctx.save_for_backward(x, scale, weight, output[1])
    ctx.shift_dtype = shift.dtype
    # Otherwise autograd would fill a gradient of zeros for rstd at every call.
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _rmsnorm_modulate_grad(ctx: Any, dout: Tensor | None, _rstd: None) -> tuple:
    if dout is None:
        return (None,) * 7
    weight = ctx.saved_tensors[2]
    dx, dshift, dscale, dweight = _rmsnorm_modulate_backward(dout, *ctx.saved_tensors)
    return dx, dshift.to(ctx.shift_dtype), dscale, None if weight is None else dweight, None, None, None


def _save_gate_residual_rmsnorm_modulate(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, y, gate, shift, scale, weight, _, _, _ = inputs
    x, out, rstd = output
    ctx.save_for_backward(x, y, gate, scale, weight, rstd)
    ctx.shift_dtype, ctx.out_dtype = shift.dtype, out.dtype
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _gate_residual_rmsnorm_modulate_grad(ctx: Any, dsum: Tensor | None, dout: Tensor | None, _rstd: None) -> tuple:
    if dsum is None and dout is None:
        return (None,) * 9
    x, y, gate, scale, weight, rstd = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(x, dtype=ctx.out_dtype)
    dx, dy, dgate, dshift, dscale, dweight = _gate_residual_rmsnorm_modulate_backward(
        dout, dsum, x, y, gate, scale, weight, rstd
    )
    dweight = None if weight is None else dweight
    return dx, dy, dgate, dshift.to(ctx.shift_dtype), dscale, dweight, None, None, None


_rmsnorm_modulate.register_autograd(_rmsnorm_modulate_grad, setup_context=_save_rmsnorm_modulate)
_gate_residual_rmsnorm_modulate.register_autograd(
    _gate_residual_rmsnorm_modulate_grad, setup_context=_save_gate_residual_rmsnorm_modulate
)


def rmsnorm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None = None, eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """RMS(x) weight (1 + scale) + shift: RMSNorm, then adaLN's modulation (arXiv 2501.01423, arXiv 2212.09748).

    x: [B, T, D]; shift, scale: [B, D]; weight: [D] or None, that of the norm; bfloat16, float16, float32 or float64,
    any strides (views with a contiguous last dimension, such as chunks of one modulation tensor, without a copy).
    Returns [B, T, D] in `out_dtype`, by default the dtype of x. Differentiable in x, shift, scale and weight. D above
    8192, float64 and DTensors take the reference.
    Raises ValueError naming the argument whose type, shape, dtype or device is wrong.
    """
    _check("rmsnorm_modulate", x, {}, {"shift": shift, "scale": scale}, weight, out_dtype, "weight")
    if not 0 < x.shape[2] <= MAX_D or not use_kernel(x, shift, scale, weight):
        return rmsnorm_modulate_reference(x, shift, scale, weight, eps, out_dtype)
    return _rmsnorm_modulate(x, shift, scale, weight, eps, out_dtype or x.dtype, torch.is_grad_enabled())[0]


def gate_residual_rmsnorm_modulate(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None = None, eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x' = x + gate y and RMS(x') weight (1 + scale) + shift: what lies between two branches of an adaLN-Zero block.

    x, y: [B, T, D]; gate, shift, scale: [B, D]; weight: [D] or None; dtypes and strides as in `rmsnorm_modulate`.
    Returns x' [B, T, D] in the dtype of x, and its modulated norm in `out_dtype`, by default the dtype of x.
    Differentiable in every tensor. Source: arXiv 2501.01423, arXiv 2212.09748.
    Raises ValueError naming the argument whose type, shape, dtype or device is wrong.
    """
    op = "gate_residual_rmsnorm_modulate"
    _check(op, x, {"y": y}, {"gate": gate, "shift": shift, "scale": scale}, weight, out_dtype, "weight")
    if not 0 < x.shape[2] <= MAX_D or not use_kernel(x, y, gate, shift, scale, weight):
        return gate_residual_rmsnorm_modulate_reference(x, y, gate, shift, scale, weight, eps, out_dtype)
    stats = torch.is_grad_enabled()  # a pass without gradient has no use for them
    return _gate_residual_rmsnorm_modulate(x, y, gate, shift, scale, weight, eps, out_dtype or x.dtype, stats)[:2]


def inspect_cases() -> Iterator[tuple[str, Callable]]:
    """(label, call): forward and backward at the shapes of LightningDiT, whose weight is float32 beside bfloat16
    tokens, for `python -m soflow_kernels.inspect`."""
    for dtype, D in itertools.product((torch.bfloat16, torch.float32), (768, 1024, 1152)):
        x, m = (torch.empty(shape, dtype=dtype) for shape in ((256, 256, D), (256, D)))
        weight, rstd = torch.empty(D), torch.empty(256, 256)
        size = f"{256 * 256} x {D} {str(dtype)[6:]}"
        for w, name in ((weight, ""), (None, "without weight ")):
            op = "rmsnorm_modulate"
            yield f"{op} {name}{size}", partial(_rmsnorm_modulate, x, m, m, w, 1e-6, dtype, True)
            yield f"{op} backward {name}{size}", partial(_rmsnorm_modulate_backward, x, x, m, w, rstd)
            op = f"gate_residual_{op}"
            yield f"{op} {name}{size}", partial(_gate_residual_rmsnorm_modulate, x, x, m, m, m, w, 1e-6, dtype, True)
            yield (
                f"{op} backward {name}{size}",
                partial(_gate_residual_rmsnorm_modulate_backward, x, x, x, x, m, m, w, rstd),
            )
