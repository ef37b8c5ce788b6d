"""LayerNorm, modulation and gated residual of pairs (value and increment, see the package), in float32:

    LayerNorm: h / a with h centred and a = sqrt(mean(h^2) + eps), a' at the end,
               so d = dh / a' - h (a'^2 - a^2) / (a a' (a + a'))
    modulation: n (1 + scale) + shift, so d = dn (1 + scale + dscale) + n dscale + dshift
    gated residual: x + gate y, so d = dx + (gate + dgate) dy + dgate y

x, y: [2, B, T, D]; gate, shift, scale: [2, B, D]; bias: [D]; bfloat16, float16 or float32. Bytes, with S = one pass
over a pair of tokens: LayerNorm and modulation 2 S, gated residual with it 4 S. At 2 x 16 384 x 1152 (a quarter of a
batch of 256 with 256 tokens) in bf16 S is 75 MB: 35 and 70 microseconds at 4.3 TB/s.
"""

import itertools
from functools import partial

import torch
from torch import Tensor

from soflow_kernels._dispatch import check_dtype, check_pair, check_quiet, inner_unit, jit, launch, tl, use_kernel
from soflow_kernels._rows import power_of_two
from soflow_kernels.increment._sigmoid import wide


def layernorm_increment(h: Tensor, dh: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """LayerNorm over the last dimension without affine, and its increment."""
    h, dh = h - h.mean(-1, keepdim=True), dh - dh.mean(-1, keepdim=True)
    start = (h.square().mean(-1, keepdim=True) + eps).sqrt()
    dvar = (dh * (2 * h + dh)).mean(-1, keepdim=True)
    end = ((h + dh).square().mean(-1, keepdim=True) + eps).sqrt()
    return h / start, dh / end - h * dvar / (start * end * (start + end))


def layernorm_modulate_increment_reference(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, dtype: torch.dtype | None = None
) -> Tensor:
    """`layernorm_modulate_increment` in plain PyTorch: any device and dtype."""
    n, dn = layernorm_increment(*wide(x).unbind(), eps)
    (b, db), (a, da) = (wide(m).unsqueeze(2).unbind() for m in (shift, scale))
    return torch.stack([n * (1 + a) + b, dn * (1 + a + da) + n * da + db]).to(dtype or x.dtype)


def gate_residual_layernorm_modulate_increment_reference(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, bias: Tensor | None = None, eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`gate_residual_layernorm_modulate_increment` in plain PyTorch: any device and dtype."""
    (h, dh), (v, dv) = wide(x).unbind(), wide(y).unbind()
    g, dg = wide(gate).unsqueeze(2).unbind()
    v = v if bias is None else v + bias.to(v.dtype)
    out = torch.stack([h + g * v, dh + (g + dg) * dv + dg * v]).to(x.dtype)
    return out, layernorm_modulate_increment_reference(out, shift, scale, eps, dtype)


# The kernels. A program does one token: row = b T + t, BLOCK columns `cols` of which D are there (`mask`).
#
#   x_p, x_b, x_t   strides of x, in elements: from value to increment, from sample to sample, from token to token;
#                   likewise those of y, gate, shift and scale
#   plane           B T D, from value to increment of what is written


@jit
def _load_pair(at, pair_stride, mask):
    value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    return value, tl.load(at + pair_stride, mask=mask, other=0.0).to(tl.float32)


@jit
def _norm_modulate(h, dh, modulation, at_out, plane, mask, eps, D: tl.constexpr):
    """LayerNorm(h) modulated, to `at_out`; modulation: places and pair strides of shift and scale."""
    at_shift, shift_p, at_scale, scale_p = modulation
    h = tl.where(mask, h - tl.sum(h, axis=0) / D, 0.0)
    dh = tl.where(mask, dh - tl.sum(dh, axis=0) / D, 0.0)
    start = tl.sqrt(tl.sum(h * h, axis=0) / D + eps)
    end = tl.sqrt(tl.sum((h + dh) * (h + dh), axis=0) / D + eps)
    dvar = tl.sum(dh * (2 * h + dh), axis=0) / D
    n = h / start
    dn = dh / end - h * (dvar / (start * end * (start + end)))
    shift, dshift = _load_pair(at_shift, shift_p, mask)
    scale, dscale = _load_pair(at_scale, scale_p, mask)
    scale = 1 + scale
    tl.store(at_out, n * scale + shift, mask=mask)
    tl.store(at_out + plane, dn * (scale + dscale) + n * dscale + dshift, mask=mask)


@jit
def _norm_kernel(
    x_ptr, shift_ptr, scale_ptr, out_ptr, x_p, x_b, x_t, shift_p, shift_b, scale_p, scale_b, T, plane, eps,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b = row // T
    cols = tl.arange(0, BLOCK)
    mask = cols < D
    h, dh = _load_pair(x_ptr + b * x_b + (row % T) * x_t + cols, x_p, mask)
    modulation = (shift_ptr + b * shift_b + cols, shift_p, scale_ptr + b * scale_b + cols, scale_p)
    _norm_modulate(h, dh, modulation, out_ptr + row * D + cols, plane, mask, eps, D)


@jit
def _gate_residual_kernel(
    x_ptr, y_ptr, gate_ptr, shift_ptr, scale_ptr, bias_ptr, res_ptr, out_ptr,
    x_p, x_b, x_t, y_p, y_b, y_t, gate_p, gate_b, shift_p, shift_b, scale_p, scale_b, T, plane, eps,
    D: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """res: the residual x + gate (y + bias); out: its norm, modulated."""
    row = tl.program_id(0).to(tl.int64)
    b = row // T
    t = row % T
    cols = tl.arange(0, BLOCK)
    mask = cols < D
    y, dy = _load_pair(y_ptr + b * y_b + t * y_t + cols, y_p, mask)
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    gate, dgate = _load_pair(gate_ptr + b * gate_b + cols, gate_p, mask)
    x, dx = _load_pair(x_ptr + b * x_b + t * x_t + cols, x_p, mask)
    # The norm is that of the residual as it is stored.
    h = (x + gate * y).to(res_ptr.dtype.element_ty)
    dh = (dx + (gate + dgate) * dy + dgate * y).to(res_ptr.dtype.element_ty)
    tl.store(res_ptr + row * D + cols, h, mask=mask)
    tl.store(res_ptr + plane + row * D + cols, dh, mask=mask)
    modulation = (shift_ptr + b * shift_b + cols, shift_p, scale_ptr + b * scale_b + cols, scale_p)
    at_out = out_ptr + row * D + cols
    _norm_modulate(h.to(tl.float32), dh.to(tl.float32), modulation, at_out, plane, mask, eps, D)


def _rows_layout(D):
    block = power_of_two(D)
    return block, min(max(block // 256, 1), 16)


@torch.library.custom_op("soflow::layernorm_modulate_increment", mutates_args=())
def _layernorm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    _, B, T, D = x.shape
    x, shift, scale = inner_unit(x), inner_unit(shift), inner_unit(scale)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    block, warps = _rows_layout(D)
    launch(
        _norm_kernel, (B * T,),
        x, shift, scale, out, x.stride(0), x.stride(1), x.stride(2), shift.stride(0), shift.stride(1),
        scale.stride(0), scale.stride(1), T, B * T * D, float(eps), D=D, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return out


@_layernorm_modulate.register_fake
def _(x, shift, scale, eps, dtype):
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.custom_op("soflow::gate_residual_layernorm_modulate_increment", mutates_args=())
def _gate_residual(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, bias: Tensor | None, eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _, B, T, D = x.shape
    x, y, gate, shift, scale = (inner_unit(v) for v in (x, y, gate, shift, scale))
    res = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    block, warps = _rows_layout(D)
    launch(
        _gate_residual_kernel, (B * T,),
        x, y, gate, shift, scale, x if bias is None else bias.contiguous(), res, out,
        x.stride(0), x.stride(1), x.stride(2), y.stride(0), y.stride(1), y.stride(2),
        gate.stride(0), gate.stride(1), shift.stride(0), shift.stride(1), scale.stride(0), scale.stride(1),
        T, B * T * D, float(eps), D=D, HAS_BIAS=bias is not None, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return res, out


@_gate_residual.register_fake
def _(x, y, gate, shift, scale, bias, eps, dtype):
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype)


def layernorm_modulate_increment(
    x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6, dtype: torch.dtype | None = None
) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift of pairs, as a pair of `dtype` (None: that of x).

    x: [2, B, T, D]; shift, scale: [2, B, D]; bfloat16, float16, float32 or float64 (which takes the reference), any
    strides; no gradient.
    Raises ValueError naming the argument that is wrong or requires a gradient.
    """
    op = "layernorm_modulate_increment"
    check_pair(op, "x", x, ("2", "B", "T", "D"))
    _, B, _, D = x.shape
    for name, value in (("shift", shift), ("scale", scale)):
        check_pair(op, name, value, (2, B, D), x)
    check_dtype(op, "dtype", dtype)
    if not use_kernel(x, shift, scale):
        return layernorm_modulate_increment_reference(x, shift, scale, eps, dtype)
    return _layernorm_modulate(x, shift, scale, eps, dtype or x.dtype)


def gate_residual_layernorm_modulate_increment(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, bias: Tensor | None = None, *,
    eps: float = 1e-6, dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x' = x + gate (y + bias) and LayerNorm(x') (1 + scale) + shift of pairs, in one pass.

    x, y: [2, B, T, D]; gate, shift, scale: [2, B, D]; bias: [D] or None, which the value of y lacks. Returns the pair
    x' in the dtype of x and the modulated pair in `dtype` (None: that of x). bfloat16, float16, float32 or float64
    (which takes the reference), any strides; no gradient.
    Raises ValueError naming the argument that is wrong or requires a gradient.
    """
    op = "gate_residual_layernorm_modulate_increment"
    check_pair(op, "x", x, ("2", "B", "T", "D"))
    _, B, _, D = x.shape
    check_pair(op, "y", y, tuple(x.shape), x)
    for name, value in (("gate", gate), ("shift", shift), ("scale", scale)):
        check_pair(op, name, value, (2, B, D), x)
    if bias is not None:
        check_quiet(op, "bias", bias, (D,), x)
    check_dtype(op, "dtype", dtype)
    if not use_kernel(x, y, gate, shift, scale, bias):
        return gate_residual_layernorm_modulate_increment_reference(x, y, gate, shift, scale, bias, eps, dtype)
    return _gate_residual(x, y, gate, shift, scale, bias, eps, dtype or x.dtype)


def inspect_cases():
    """(label, call): at the shipped shapes, for `python -m soflow_kernels.inspect`. "mixed": the residual in float32,
    everything else in bfloat16."""
    half, single = torch.bfloat16, torch.float32
    kinds = (("bfloat16", half, half), ("float32", single, single), ("mixed", single, half))
    for (kind, residual, low), D in itertools.product(kinds, (768, 1024, 1152)):
        x, y = (torch.zeros(2, 2, 16, D, dtype=dtype) for dtype in (residual, low))
        m, bias = torch.zeros(2, 2, D, dtype=low), torch.zeros(D, dtype=residual)
        yield f"layernorm_modulate_increment {D} {kind}", partial(_layernorm_modulate, x, m, m, 1e-6, low)
        call = partial(_gate_residual, x, y, m, m, m, bias, 1e-6, low)
        yield f"gate_residual_layernorm_modulate_increment {D} {kind}", call
