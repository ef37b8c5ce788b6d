"""The halves of `layernorm_modulate` and `gate_residual_layernorm_modulate`, for a backward of one's own.

An autograd node that covers a norm and the product after it need not keep the product's input, one [B, T, D] of every
boundary: its forward calls `boundary`, keeps what that returns but the norm, and its backward makes the norm again.
Formulas, bytes and source are those of `adaln`, whose kernels run here. Neither function is differentiable.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from soflow_kernels._dispatch import check_dtype, check_tensor, use_kernel
from soflow_kernels.adaln import (
    MAX_D,
    _gate_residual_layernorm_modulate,
    _gate_residual_layernorm_modulate_backward,
    _layernorm_modulate,
    _layernorm_modulate_backward,
)


class Boundary(NamedTuple):
    """What `boundary` returns."""

    sum: Tensor
    """x' = x + gate (y + bias), [B, T, D], of the dtype of x; x itself where there is no y."""
    out: Tensor
    """LN(x') (1 + scale) + shift, [B, T, D]."""
    mean: Tensor
    rstd: Tensor
    """Of LN(x'), float32 [B, T] from the kernels, [B, T, 1] from the reference."""


class Gradients(NamedTuple):
    """What `boundary_backward` returns; None for what was not given."""

    x: Tensor
    y: Tensor | None
    gate: Tensor | None
    shift: Tensor
    scale: Tensor
    bias: Tensor | None


def boundary_reference(x, y, gate, shift, scale, eps=1e-6, bias=None, out_dtype=None):
    """`boundary` in plain PyTorch: any device and dtype."""
    if y is not None:
        x = torch.addcmul(x, gate.unsqueeze(1), y if bias is None else y + bias).to(x.dtype)
    normed, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
    out = torch.addcmul(shift.unsqueeze(1), normed, 1 + scale.unsqueeze(1)).to(out_dtype or x.dtype)
    return Boundary(x, out, mean, rstd)


def boundary_backward_reference(dout, dsum, x, y, gate, scale, bias, mean, rstd, eps=1e-6):
    """`boundary_backward` in plain PyTorch: any device and dtype."""
    size = x.shape[-1:]
    dout = dout.to(x.dtype)
    u = dout * (1 + scale.unsqueeze(1)).to(x.dtype)
    dx = torch.ops.aten.native_layer_norm_backward(u, x, size, mean, rstd, None, None, [True, False, False])[0]
    dx = dx if dsum is None else dx + dsum
    normed = torch.native_layer_norm(x, size, None, None, eps)[0]
    dshift, dscale = dout.sum(1).to(scale.dtype), (dout * normed).sum(1).to(scale.dtype)
    if y is None:
        return Gradients(dx, None, None, dshift, dscale, None)
    dy = (dx * gate.unsqueeze(1)).to(y.dtype)
    dgate = (dx * (y if bias is None else y + bias)).sum(1).to(gate.dtype)
    return Gradients(dx, dy, dgate, dshift, dscale, None if bias is None else dy.sum((0, 1)).to(bias.dtype))


def boundary(x, y, gate, shift, scale, eps=1e-6, bias=None, out_dtype=None):
    """x' = x + gate (y + bias), its LayerNorm modulated, and the statistics that `boundary_backward` takes.

    y and gate may be None: then x' is x itself. Shapes, dtypes and errors as in `gate_residual_layernorm_modulate`.
    Returns a Boundary.
    """
    op = "boundary"
    check_tensor(op, "x", x, ("B", "T", "D"))
    B, T, D = x.shape
    if y is not None:
        check_tensor(op, "y", y, (B, T, D), x)
        check_tensor(op, "gate", gate, (B, D), x)
    if bias is not None:
        check_tensor(op, "bias", bias, (D,), x)
    check_tensor(op, "shift", shift, (B, D), x)
    check_tensor(op, "scale", scale, (B, D), x)
    check_dtype(op, "out_dtype", out_dtype)
    if not 0 < D <= MAX_D or not use_kernel(x, y, gate, shift, scale, bias):
        return boundary_reference(x, y, gate, shift, scale, eps, bias, out_dtype)
    out_dtype = out_dtype or x.dtype
    if y is None:
        return Boundary(x, *_layernorm_modulate(x, shift, scale, eps, out_dtype, True))
    return Boundary(*_gate_residual_layernorm_modulate(x, y, gate, shift, scale, bias, eps, out_dtype, True))


def boundary_backward(dout, dsum, x, y, gate, scale, bias, mean, rstd, eps=1e-6):
    """The gradients of `boundary` from those of its `out` and `sum`, both [B, T, D]; dsum None: no gradient came.

    x is the `sum` that `boundary` returned; the others are what it was given and returned. Returns Gradients.
    Raises ValueError for gradients of another shape, dtype or device.
    """
    op = "boundary_backward"
    check_tensor(op, "x", x, ("B", "T", "D"))
    check_tensor(op, "dout", dout, tuple(x.shape), x)
    if dsum is not None:
        check_tensor(op, "dsum", dsum, tuple(x.shape), x)
    if mean.dim() != 2 or not use_kernel(x, dout, dsum, y, gate, scale, bias):
        return boundary_backward_reference(dout, dsum, x, y, gate, scale, bias, mean, rstd, eps)
    if y is None:
        dx, dshift, dscale = _layernorm_modulate_backward(dout, x, scale, mean, rstd)
        dx = dx if dsum is None else dx + dsum
        return Gradients(dx, None, None, dshift, dscale, None)
    dx, dy, dgate, dshift, dscale, dbias = _gate_residual_layernorm_modulate_backward(
        dout, dsum, x, y, gate, scale, bias, mean, rstd
    )
    return Gradients(dx, dy, dgate, dshift, dscale, None if bias is None else dbias)
