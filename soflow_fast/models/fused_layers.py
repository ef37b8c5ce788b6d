"""The products of a DiT block with what comes before them, keeping for the backward only what cannot be made again.

A product keeps its input, which here is a modulated norm or a GELU: cheap to make again from what the norm or the GELU
itself keeps. So each of these nodes covers both. Per token and block there remain, in units of the hidden size D: the
residual before attention (1), q, k and v (3), attention's result (1), its projection (1), the residual before the MLP
(1), the MLP's inner values before the GELU (4) and its result (1): 12 D, and the norms' statistics.

Weights may have copies in the dtype of the activations (`low_precision`): products take the copies, and the gradient
goes to the weights. Without gradient, and under forward-mode AD or torch.func, plain compositions run instead.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from soflow_kernels import (
    bias_gelu,
    gate_residual_layernorm_modulate,
    layernorm_modulate,
    linear_gelu,
    transformed,
    use_kernel,
)
from soflow_kernels.adaln import adaln_bwd, adaln_fwd
from soflow_kernels.gelu import bias_gelu_backward

EPS = 1e-6
"""Of the norms."""


class Weight(NamedTuple):
    """A product's weight [N, K] and bias [N], and the two as they are multiplied, which may be copies."""

    master: Tensor
    master_bias: Tensor
    low: Tensor
    bias: Tensor
    product: Callable[[Tensor], Tensor] | None = None
    """How to multiply with it, without the bias, where that is not a plain product."""


class Entry(NamedTuple):
    """What leads into a norm: x' = x + gate (y + bias), then LN(x') (1 + scale) + shift. y, gate: None for x' = x."""

    x: Tensor
    y: Tensor | None
    gate: Tensor | None
    bias: Tensor | None
    shift: Tensor
    scale: Tensor


def _product_backward(dout: Tensor, x: Tensor, weight: Tensor, has_bias: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    rows = dout.flatten(0, -2)
    return dout @ weight, rows.t() @ x.flatten(0, -2), rows.sum(0) if has_bias else None


class _Linear(torch.autograd.Function):
    """x W' + b by the copies, gradients to the masters."""

    @staticmethod
    def forward(ctx: Any, x, master, master_bias, low, bias):
        ctx.save_for_backward(x, low)
        ctx.has_bias = master_bias is not None
        return F.linear(x, low, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        return *_product_backward(dout, x, weight, ctx.has_bias), None, None


class _NormedLinear(torch.autograd.Function):
    """x', LN(x') modulated and multiplied; keeps x', y and statistics, not the norm."""

    @staticmethod
    def forward(ctx: Any, x, y, gate, y_bias, shift, scale, master, master_bias, low, bias):
        low, bias = (master, master_bias) if low is None else (low, bias)
        x, h, mean, rstd = adaln_fwd(x, y, gate, shift, scale, EPS, y_bias, low.dtype)
        ctx.save_for_backward(x, y, gate, y_bias, shift, scale, mean, rstd, low)
        out = F.linear(h, low, bias)
        return out if y is None else (x, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *douts):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, y, gate, y_bias, shift, scale, mean, rstd, low = ctx.saved_tensors
        dsum = douts[0] if len(douts) == 2 else None
        h = layernorm_modulate(x, shift, scale, EPS, low.dtype)
        dh, dweight, dbias = _product_backward(douts[-1], h, low, True)
        del h
        d = adaln_bwd(dh, dsum, x, y, gate, scale, y_bias, mean, rstd, EPS)
        return d.x, d.y, d.gate, d.bias, d.shift, d.scale, dweight, dbias, None, None


class _NormedMLP(torch.autograd.Function):
    """x', LN(x') modulated, and the MLP without its last bias; keeps x', y, statistics and (`keep`) the inner values.

    fused: the first bias goes with the GELU, else with its product. The inner values are returned as well, as the
    product left them and without gradient.
    """

    @staticmethod
    def forward(ctx: Any, x, y, gate, y_bias, shift, scale, w1, b1, low1, bias1, w2, b2, low2, bias2, fused, keep):
        low1, bias1 = (w1, b1) if low1 is None else (low1, bias1)
        low2, bias2 = (w2, b2) if low2 is None else (low2, bias2)
        x, h, mean, rstd = adaln_fwd(x, y, gate, shift, scale, EPS, y_bias, low1.dtype)
        u = F.linear(h, low1, None if fused else bias1)
        inner = bias_gelu(u, b1) if fused else F.gelu(u, approximate="tanh")
        out = F.linear(inner, low2, None if fused else bias2)
        kept = u if keep else None
        ctx.save_for_backward(x, y, gate, y_bias, shift, scale, mean, rstd, low1, bias1, b1, low2, kept)
        ctx.fused = fused
        ctx.mark_non_differentiable(u)
        return x, out, u

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dsum, dout, _):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, y, gate, y_bias, shift, scale, mean, rstd, low1, bias1, b1, low2, u = ctx.saved_tensors
        h = layernorm_modulate(x, shift, scale, EPS, low1.dtype)
        if u is None:
            u = F.linear(h, low1, None if ctx.fused else bias1)
        dinner = dout @ low2
        if ctx.fused:
            du, db1, inner = bias_gelu_backward(dinner, u, b1)
        else:
            du = torch.ops.aten.gelu_backward(dinner, u, approximate="tanh")
            db1, inner = du.flatten(0, -2).sum(0), F.gelu(u, approximate="tanh")
        del dinner, u
        dout = dout.flatten(0, -2)
        dw2, db2 = dout.t() @ inner.flatten(0, -2), None if ctx.fused else dout.sum(0)
        del inner
        dh, dw1, _ = _product_backward(du, h, low1, False)
        del h, du
        d = adaln_bwd(dh, dsum, x, y, gate, scale, y_bias, mean, rstd, EPS)
        return d.x, d.y, d.gate, d.bias, d.shift, d.scale, dw1, db1, None, None, dw2, db2, *[None] * 4


def _apart(weight: Weight) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """A weight as the nodes take it: no copies where it is multiplied itself (torch.compile refuses one twice)."""
    master, bias, low, low_bias, _ = weight
    return (master, bias, None, None) if low is master else (master, bias, low, low_bias)


def _composed() -> bool:
    """Whether operations are composed one by one: nothing is kept, or a derivative of another kind is taken."""
    return not torch.is_grad_enabled() or transformed()


def _operand(weight: Tensor, low: Tensor) -> Tensor:
    """What a composed operation multiplies: the copy, or what leads back to the weight."""
    return weight.to(low.dtype) if torch.is_grad_enabled() and weight is not low else low


def defers_bias(x: Tensor) -> bool:
    """Whether the operation after a product of x takes the product's bias along: where it is a kernel."""
    return use_kernel(x)


def linear(x: Tensor, weight: Weight, *, bias: bool = True) -> Tensor:
    """x W' + b (or without b), [..., K] -> [..., N], in the dtype of the copy."""
    master, master_bias, low, low_bias, product = weight
    if product is not None:
        return product(x) + (master_bias.to(low.dtype) if bias else 0)
    if low is master or _composed():
        return F.linear(x, _operand(master, low), _operand(master_bias, low_bias) if bias else None)
    return _Linear.apply(x, master, master_bias if bias else None, low, low_bias if bias else None)


def _norm(entry: Entry, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, y, gate, bias, shift, scale = entry
    if y is None:
        return x, layernorm_modulate(x, shift, scale, EPS, dtype)
    return gate_residual_layernorm_modulate(x, y, gate, shift, scale, EPS, bias, dtype)


def normed_linear(entry: Entry, weight: Weight, *, keep_norm: bool = False) -> tuple[Tensor, Tensor]:
    """x' and the product of its modulated norm, [B, T, D] and [B, T, N]. keep_norm: keep the product's input too."""
    if keep_norm or weight.product or _composed():
        x, h = _norm(entry, weight.low.dtype)
        return x, linear(h, weight)
    x, y, gate, bias, shift, scale = entry
    out = _NormedLinear.apply(x, y, gate, bias, shift, scale, *_apart(weight))
    return out if isinstance(out, tuple) else (x, out)


def normed_mlp(
    entry: Entry,
    first: Weight,
    second: Weight,
    *,
    keep_norm: bool = False,
    keep_inner: bool = True,
    taped: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x', the MLP (product, tanh GELU, product) of its modulated norm, and the inner values before the GELU.

    The last bias is left out where `defers_bias`, and the first one is not yet in the inner values; these come without
    gradient, None unless they are at hand (`taped`: they are). keep_norm: keep all inputs of products for the backward;
    keep_inner False: make the inner values again in the backward.
    """
    fused = defers_bias(entry.x)
    if not (keep_norm or first.product or _composed()):
        x, y, gate, bias, shift, scale = entry
        return _NormedMLP.apply(x, y, gate, bias, shift, scale, *_apart(first), *_apart(second), fused, keep_inner)
    x, h = _norm(entry, first.low.dtype)
    if taped or first.product or (torch.is_grad_enabled() and (fused or first.low is not first.master)):
        u = linear(h, first, bias=not fused)
        inner = bias_gelu(u, first.master_bias) if fused else F.gelu(u, approximate="tanh")
        return x, linear(inner, second, bias=not fused), u.detach()
    inner = linear_gelu(h, _operand(first.master, first.low), _operand(first.master_bias, first.bias))
    return x, linear(inner, second, bias=not fused), None


class _Stacked(torch.autograd.Function):
    """x W' + b for weights that lie side by side in memory, with the gradient of each."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, rows, *masters):
        ctx.save_for_backward(x, weight)
        ctx.rows = rows
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        dx, dweight, dbias = _product_backward(dout, x, weight, True)
        assert dbias is not None
        each = zip(dweight.split(ctx.rows), dbias.split(ctx.rows), strict=True)
        return dx, None, None, None, *[gradient for pair in each for gradient in pair]


def stacked_linear(x: Tensor, weights: list[Weight], stack: tuple[Tensor, Tensor] | None) -> list[Tensor]:
    """The products of one x [B, K] with several weights, [B, N] each, as one product where they are a `stack`."""
    if stack is None or (torch.is_grad_enabled() and transformed()):
        return [linear(x, weight) for weight in weights]
    rows = [len(weight.low) for weight in weights]
    if torch.is_grad_enabled():
        out = _Stacked.apply(x, *stack, rows, *[m for weight in weights for m in weight[:2]])
    else:
        out = F.linear(x, *stack)
    return list(out.split(rows, dim=1))
