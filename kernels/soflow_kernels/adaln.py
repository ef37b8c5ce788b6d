"""LayerNorm and adaLN-Zero modulation, alone and behind the gated residual sum (Peebles & Xie 2023, arXiv 2212.09748,
section 3.2; LayerNorm: arXiv 1607.06450).

    layernorm_modulate                  out = LN(x) (1 + scale) + shift
    gate_residual_layernorm_modulate    x' = x + gate (y + bias);  out = LN(x') (1 + scale) + shift
    adaln_fwd, adaln_bwd                the forward and the backward of either, for an autograd node of one's own

LN(x) = (x - mean) / sqrt(var + eps) over the last dimension, without affine. x, y, x', out: [B, T, D]; gate, shift,
scale: [B, D], one row per sample; bias: [D] or None, the bias of the product that made y. Tensors are bfloat16, float16
or float32 and may differ in dtype; everything inside is float32, and the statistics are those of x' as it is stored.

Backward, with u = dout (1 + scale), h = LN(x'), c1 = mean(u) and c2 = mean(u h) over D, and dsum the gradient of x':

    dx = rstd (u - c1 - h c2) + dsum     dy = gate dx             dgate = sum_t dx (y + bias)
    dshift = sum_t dout                  dscale = sum_t dout h    dbias = sum_bt dy

Bytes, with S = one pass over [B, T, D]: forward 2 S and 4 S; backward 3 S, and 6 S (4 reads, 2 writes), 1 S more where
the norm is made again for the gradient of the product after it. Partial sums
add `chunks` rows of [D] floats per sample and gradient. At 65 536 x 1152 in bf16 S is 151 MB, 0.035 ms at 4.3 TB/s:
floors of 0.07, 0.14, 0.11 and 0.21 ms. Kept for the backward: x', y, mean and rstd; h is recomputed.

Legend of the kernels, forward and backward:

    b, t, row       a sample, a token in it, the token in the whole batch: row = b T + t
    program         the work of one program: `rows` tokens of one sample, one of the `chunks` that its T tokens make;
                    program = b chunks + chunk
    NAME_b, NAME_t  strides of a tensor over samples and tokens; the last dimension is contiguous
    NAME_at         where the row of this token begins in a tensor; what the kernel writes is contiguous
    FIRST, WIDTH    a segment: columns FIRST to FIRST + WIDTH of a row, in the registers of the program (see `_rows`)
    MAIN, TAIL      the one or two segments of a row of D columns, 1152 = 1024 + 128: every step is done for (0, MAIN)
                    and, unless TAIL is 0, once more for (MAIN, TAIL). Only the means over D join them
    sums            (dshift, dscale, dgate, dbias) over the tokens of the program, in registers until it ends
    partial_ptr     [planes, B, chunks, D]: the sums of every program, one plane for each gradient; `_reduce.finish`
                    adds up the chunks
    None            in place of a pointer: the tensor is not given (y, gate: no residual sum; dsum: no gradient of x';
                    mean, rstd: not kept), and no code is made for it
    CENTRED         False: the norm is RMSNorm, without a mean, and may have a weight (see `rmsnorm`). The backward has
                    no mean_ptr then
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from soflow_kernels._dispatch import (
    check_dtype,
    check_tensor,
    inner_unit,
    jit,
    launch,
    operation,
    tl,
    transformed,
    use_kernel,
)
from soflow_kernels._reduce import finish, split_rows
from soflow_kernels._rows import backward_layout, centre, forward_layout, load, stages, store
from soflow_kernels.gated_residual import gate_residual_reference

MAX_D = 8192
"""Columns of the widest row that the kernels take; wider ones go to the references."""


class AdaLNForward(NamedTuple):
    """The result of `adaln_fwd`."""

    sum: Tensor
    """x' = x + gate (y + bias), [B, T, D], in the dtype of x; x itself where there is no y."""
    out: Tensor
    """LN(x') (1 + scale) + shift, [B, T, D]."""
    mean: Tensor
    """Mean of x' over D, float32: [B, T] from the kernels, [B, T, 1] from the reference."""
    rstd: Tensor
    """1 / sqrt(var + eps) of x' over D, of the shape of `mean`."""


class AdaLNGradients(NamedTuple):
    """The result of `adaln_bwd`, in the shapes and dtypes of the arguments; None for what was not given."""

    x: Tensor
    y: Tensor | None
    gate: Tensor | None
    shift: Tensor
    """In the dtype of scale."""
    scale: Tensor
    bias: Tensor | None
    out: Tensor | None = None
    """No gradient: the `out` of `adaln_fwd` once more, in the dtype of dout."""


def _modulated(normed: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.addcmul(shift.unsqueeze(1), normed, 1 + scale.unsqueeze(1))
    # A cast that changes nothing would be the same tensor, which torch 2.11 cannot tell apart in an autograd node.
    return out if out.dtype == dtype else out.to(dtype)


def layernorm_modulate_reference(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, out_dtype: torch.dtype | None = None
) -> Tensor:
    """`layernorm_modulate` in plain PyTorch: any device and dtype, any order of differentiation."""
    # A GPU's norm of half precision has a tangent in float32, which no product takes beside a value in half.
    normed = F.layer_norm(_wide(x) if transformed() else x, x.shape[-1:], None, None, eps)
    return _modulated(normed if normed.dtype == x.dtype else normed.to(x.dtype), shift, scale, out_dtype or x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gate_residual_layernorm_modulate_reference(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`gate_residual_layernorm_modulate` in plain PyTorch: any device and dtype, any order of differentiation."""
    x = gate_residual_reference(x, y, gate, bias)
    return x, layernorm_modulate_reference(x, shift, scale, eps, out_dtype)


def adaln_fwd_reference(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float = 1e-6,
    bias: Tensor | None = None, out_dtype: torch.dtype | None = None,
) -> AdaLNForward:  # fmt: skip
    """`adaln_fwd` in plain PyTorch: any device and dtype."""
    if y is not None:
        assert gate is not None
        x = gate_residual_reference(x, y, gate, bias)
    normed, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
    return AdaLNForward(x, _modulated(normed, shift, scale, out_dtype or x.dtype), mean, rstd)


def adaln_bwd_reference(
    dout: Tensor, dsum: Tensor | None, x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor,
    bias: Tensor | None, mean: Tensor, rstd: Tensor, eps: float = 1e-6, shift: Tensor | None = None,
) -> AdaLNGradients:  # fmt: skip
    """`adaln_bwd` in plain PyTorch: any device and dtype."""
    size = x.shape[-1:]
    out_dtype, dout = dout.dtype, dout.to(x.dtype)
    u = dout * (1 + scale.unsqueeze(1)).to(x.dtype)
    dx = torch.ops.aten.native_layer_norm_backward(u, x, size, mean, rstd, None, None, [True, False, False])[0]
    dx = dx if dsum is None else dx + dsum
    normed = torch.native_layer_norm(x, size, None, None, eps)[0]
    dshift, dscale = dout.sum(1).to(scale.dtype), (dout * normed).sum(1).to(scale.dtype)
    out = None if shift is None else _modulated(normed, shift, scale, out_dtype)
    if y is None:
        return AdaLNGradients(dx, None, None, dshift, dscale, None, out)
    assert gate is not None
    dy = (dx * gate.unsqueeze(1)).to(y.dtype)
    dgate = (dx * (y if bias is None else y + bias)).sum(1).to(gate.dtype)
    dbias = None if bias is None else dy.sum((0, 1)).to(bias.dtype)
    return AdaLNGradients(dx, dy, dgate, dshift, dscale, dbias, out)


@jit
def _residual(
    x_ptr, y_ptr, bias_ptr, sum_ptr, x_at, y_at, sum_at, gate, bias,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """x' of one token, float32; written, and rounded to what was written, where there is a y."""
    x = load(x_ptr + x_at, FIRST, WIDTH, D)
    if y_ptr is not None:
        y = load(y_ptr + y_at, FIRST, WIDTH, D)
        if bias_ptr is not None:
            y += bias
        x = (x + gate * y).to(sum_ptr.dtype.element_ty)
        store(sum_ptr + sum_at, x, FIRST, WIDTH, D)
        x = x.to(tl.float32)
    return x


@jit
def _gate_and_bias(gate_ptr, bias_ptr, gate_at, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """A segment of the gate of a sample and of the bias, 0 where they are not given."""
    gate = tl.zeros([WIDTH], tl.float32)
    bias = gate
    if gate_ptr is not None:
        gate = load(gate_ptr + gate_at, FIRST, WIDTH, D)
    if bias_ptr is not None:
        bias = load(bias_ptr, FIRST, WIDTH, D)
    return gate, bias


@jit
def _factor(scale_row, weight_ptr, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """1 + scale, times the weight of the norm where it has one: what a normalised row is multiplied by, a segment."""
    factor = 1 + load(scale_row, FIRST, WIDTH, D)
    if weight_ptr is not None:
        factor *= load(weight_ptr, FIRST, WIDTH, D)
    return factor


@jit
def _forward_kernel(
    x_ptr, y_ptr, gate_ptr, bias_ptr, shift_ptr, scale_ptr, sum_ptr, out_ptr, mean_ptr, rstd_ptr, weight_ptr,
    x_b, x_t, y_b, y_t, gate_b, shift_b, scale_b, T, chunks, rows, eps,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """One program: `rows` tokens of one sample, whose modulation stays in registers. Legend: top of the file."""
    program = tl.program_id(0).to(tl.int64)
    b = program // chunks
    first = (program % chunks) * rows
    gate_at = b * gate_b
    shift_row = shift_ptr + b * shift_b
    scale_row = scale_ptr + b * scale_b
    scale = _factor(scale_row, weight_ptr, 0, MAIN, D)
    shift = load(shift_row, 0, MAIN, D)
    gate, bias = _gate_and_bias(gate_ptr, bias_ptr, gate_at, 0, MAIN, D)
    if TAIL:
        scale_tail = _factor(scale_row, weight_ptr, MAIN, TAIL, D)
        shift_tail = load(shift_row, MAIN, TAIL, D)
        gate_tail, bias_tail = _gate_and_bias(gate_ptr, bias_ptr, gate_at, MAIN, TAIL, D)
    # With two stages the next token is on its way to shared memory while this one is computed.
    for t in tl.range(first, tl.minimum(first + rows, T), num_stages=STAGES):
        row = b * T + t
        x_at = b * x_b + t * x_t
        y_at = b * y_b + t * y_t
        sum_at = row * D
        x = _residual(x_ptr, y_ptr, bias_ptr, sum_ptr, x_at, y_at, sum_at, gate, bias, 0, MAIN, D)
        total = tl.sum(x, axis=0)  # where nothing asks for it, the compiler leaves it out
        if TAIL:
            x_tail = _residual(x_ptr, y_ptr, bias_ptr, sum_ptr, x_at, y_at, sum_at, gate_tail, bias_tail, MAIN, TAIL, D)
            total += tl.sum(x_tail, axis=0)
        if CENTRED:
            mean = total / D
            # The variance from the centred values: E[x^2] - mean^2 would cancel.
            x = centre(x, mean, 0, MAIN, D)
        square = tl.sum(x * x, axis=0)
        if TAIL:
            if CENTRED:
                x_tail = centre(x_tail, mean, MAIN, TAIL, D)
            square += tl.sum(x_tail * x_tail, axis=0)
        rstd = 1 / tl.sqrt(square / D + eps)
        if mean_ptr is not None:
            tl.store(mean_ptr + row, mean)
        if rstd_ptr is not None:
            tl.store(rstd_ptr + row, rstd)
        out_row = out_ptr + row * D
        store(out_row, x * rstd * scale + shift, 0, MAIN, D)
        if TAIL:
            store(out_row, x_tail * rstd * scale_tail + shift_tail, MAIN, TAIL, D)


@jit
def _begin(
    gate_ptr, gate_at, scale_row, weight_ptr, shift_ptr, shift_at,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """((factor, shift, gate), sums) of a program before its first token: what is not given is 0, and so are sums."""
    zero = tl.zeros([WIDTH], tl.float32)
    gate = zero
    shift = zero
    if gate_ptr is not None:
        gate = load(gate_ptr + gate_at, FIRST, WIDTH, D)
    if shift_ptr is not None:
        shift = load(shift_ptr + shift_at, FIRST, WIDTH, D)
    return (_factor(scale_row, weight_ptr, FIRST, WIDTH, D), shift, gate), (zero, zero, zero, zero)


@jit
def _through_modulation(
    x_row, dout_row, shift_ptr, out_ptr, out_at, mean, rstd, modulation, sums,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """(h, u, sums) of one token, as far as no mean over D is needed: dshift and dscale have grown. Where there is a
    shift, the modulated norm is written once more."""
    scale, shift, _ = modulation
    dshift, dscale, dgate, dbias = sums
    h = (load(x_row, FIRST, WIDTH, D) - mean) * rstd
    if shift_ptr is not None:
        store(out_ptr + out_at, h * scale + shift, FIRST, WIDTH, D)
    dout = load(dout_row, FIRST, WIDTH, D)
    return h, dout * scale, (dshift + dout, dscale + dout * h, dgate, dbias)


@jit
def _through_residual(
    dx, dsum_ptr, y_ptr, bias_ptr, dx_ptr, dy_ptr, dsum_at, y_at, dx_at, gate, sums,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Write dx and dy of one token, from the gradient that came through its norm: the last two sums have grown."""
    dshift, dscale, dgate, dbias = sums
    if dsum_ptr is not None:
        dx += load(dsum_ptr + dsum_at, FIRST, WIDTH, D)
    store(dx_ptr + dx_at, dx, FIRST, WIDTH, D)
    if y_ptr is not None:
        y = load(y_ptr + y_at, FIRST, WIDTH, D)
        if bias_ptr is not None:
            y += load(bias_ptr, FIRST, WIDTH, D)  # not after the loop: it may cancel y
        dgate += dx * y
        dx *= gate
        if bias_ptr is not None:
            dbias += dx
        store(dy_ptr + dx_at, dx, FIRST, WIDTH, D)
    return dshift, dscale, dgate, dbias


@jit
def _store_sums(partial_row, plane, sums, y_ptr, bias_ptr, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    dshift, dscale, dgate, dbias = sums
    store(partial_row, dshift, FIRST, WIDTH, D)
    store(partial_row + plane, dscale, FIRST, WIDTH, D)
    if y_ptr is not None:
        store(partial_row + 2 * plane, dgate, FIRST, WIDTH, D)
    if bias_ptr is not None:
        store(partial_row + 3 * plane, dbias, FIRST, WIDTH, D)


@jit
def _backward_kernel(
    dout_ptr, dsum_ptr, x_ptr, y_ptr, gate_ptr, bias_ptr, shift_ptr, scale_ptr, mean_ptr, rstd_ptr, dx_ptr, dy_ptr,
    out_ptr, partial_ptr, weight_ptr,
    dout_b, dout_t, dsum_b, dsum_t, x_b, x_t, y_b, y_t, gate_b, shift_b, scale_b, T, chunks, rows,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: `rows` tokens of one sample, whose sums over the tokens stay in registers until the end.

    For each token: back through the modulation, which needs one column at a time; the two means over D; back through
    the norm and the residual sum, again a column at a time. Legend: top of the file.
    """
    program = tl.program_id(0).to(tl.int64)
    b = program // chunks
    first = (program % chunks) * rows
    gate_at = b * gate_b
    scale_row = scale_ptr + b * scale_b
    shift_at = b * shift_b
    modulation, sums = _begin(gate_ptr, gate_at, scale_row, weight_ptr, shift_ptr, shift_at, 0, MAIN, D)
    if TAIL:
        modulation_tail, sums_tail = _begin(
            gate_ptr, gate_at, scale_row, weight_ptr, shift_ptr, shift_at, MAIN, TAIL, D
        )
    for t in tl.range(first, tl.minimum(first + rows, T), num_stages=STAGES):
        row = b * T + t
        x_row = x_ptr + b * x_b + t * x_t
        dout_row = dout_ptr + b * dout_b + t * dout_t
        dsum_at = b * dsum_b + t * dsum_t
        y_at = b * y_b + t * y_t
        dx_at = row * D
        mean = 0.0
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + row)
        rstd = tl.load(rstd_ptr + row)
        h, u, sums = _through_modulation(
            x_row, dout_row, shift_ptr, out_ptr, dx_at, mean, rstd, modulation, sums, 0, MAIN, D
        )
        sum_u, sum_uh = u, u * h
        if TAIL:
            h_tail, u_tail, sums_tail = _through_modulation(
                x_row, dout_row, shift_ptr, out_ptr, dx_at, mean, rstd, modulation_tail, sums_tail, MAIN, TAIL, D
            )
            # A thread holds MAIN / TAIL neighbouring columns for each column of the tail: folding them first, in
            # registers, leaves one sum across the warps instead of two.
            sum_u = tl.sum(tl.reshape(sum_u, [TAIL, MAIN // TAIL]), axis=1) + u_tail
            sum_uh = tl.sum(tl.reshape(sum_uh, [TAIL, MAIN // TAIL]), axis=1) + u_tail * h_tail
        if mean_ptr is not None:
            # Joined, both sums make one way across the warps; split, they are numbers again.
            c1, c2 = tl.split(tl.sum(tl.join(sum_u, sum_uh), axis=0))
            c1 = c1 / D
        else:
            c1 = 0.0
            c2 = tl.sum(sum_uh, axis=0)
        c2 = c2 / D
        sums = _through_residual(
            rstd * (u - c1 - h * c2), dsum_ptr, y_ptr, bias_ptr, dx_ptr, dy_ptr, dsum_at, y_at, dx_at,
            modulation[2], sums, 0, MAIN, D,
        )  # fmt: skip
        if TAIL:
            sums_tail = _through_residual(
                rstd * (u_tail - c1 - h_tail * c2), dsum_ptr, y_ptr, bias_ptr, dx_ptr, dy_ptr, dsum_at, y_at, dx_at,
                modulation_tail[2], sums_tail, MAIN, TAIL, D,
            )  # fmt: skip
    partial_row = partial_ptr + program * D
    plane = tl.num_programs(0).to(tl.int64) * D
    _store_sums(partial_row, plane, sums, y_ptr, bias_ptr, 0, MAIN, D)
    if TAIL:
        _store_sums(partial_row, plane, sums_tail, y_ptr, bias_ptr, MAIN, TAIL, D)


def _strides(tensor: Tensor | None) -> tuple[int, int]:
    """Strides over samples and tokens of a tensor [B, T, D]; any number does for one that is not given."""
    return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1))


def _forward(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, bias: Tensor | None, eps: float,
    out_dtype: torch.dtype, stats: bool, centred: bool = True, weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(x', out, mean, rstd): x' is x itself where there is no y; mean and rstd are empty without `stats`. Not centred,
    the norm is RMSNorm, with a weight [D] or without, and mean is empty."""
    B, T, D = x.shape
    x, shift, scale = inner_unit(x), inner_unit(shift), inner_unit(scale)
    y, gate = (None, None) if y is None or gate is None else (inner_unit(y), inner_unit(gate))
    sums = None if y is None else torch.empty(B, T, D, dtype=x.dtype, device=x.device)
    out = torch.empty(B, T, D, dtype=out_dtype, device=x.device)
    mean, rstd = (
        torch.empty((B, T) if kept else 0, dtype=torch.float32, device=x.device) for kept in (stats and centred, stats)
    )
    # 8 tokens a program spread the loads of the modulation; fewer where that would leave the GPU idle.
    rows = min(8, max(1, B * T // 4096))
    chunks = -(-T // rows)
    main, tail, warps = forward_layout(D, 2 if y is None else 4)
    # With more than 16 columns a thread, or 16 and their bias: see `_backward`. With fewer, less than this is taken.
    many = main + tail > 512 * warps - (bias is not None)
    registers = 128 if y is not None and many else None
    launch(
        _forward_kernel, (B * chunks,),
        x, y, gate, None if bias is None else bias.contiguous(), shift, scale, sums, out,
        mean if stats and centred else None, rstd if stats else None, None if weight is None else weight.contiguous(),
        *_strides(x), *_strides(y), 0 if gate is None else gate.stride(0), shift.stride(0), scale.stride(0),
        T, chunks, rows, float(eps), D=D, MAIN=main, TAIL=tail, STAGES=stages(D), CENTRED=centred,
        num_warps=warps, maxnreg=registers,
    )  # fmt: skip
    return x if sums is None else sums, out, mean, rstd


def _backward(
    dout: Tensor, dsum: Tensor | None, x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor,
    bias: Tensor | None, mean: Tensor | None, rstd: Tensor, shift: Tensor | None = None, weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """(dx, dy, out, [dshift, dscale, dgate, dbias]): without y dy is dx, without shift out is empty, and the list ends
    with what there is. mean None: the norm is RMSNorm. With a weight [D], dscale is float32, and the gradient of
    weight (1 + scale)."""
    B, T, D = x.shape
    dout, x, scale = inner_unit(dout), inner_unit(x), inner_unit(scale)
    dsum = None if dsum is None else inner_unit(dsum)
    dx = torch.empty(B, T, D, dtype=x.dtype, device=x.device)
    dy, dtypes = dx, [scale.dtype, scale.dtype if weight is None else torch.float32]
    if y is not None:
        assert gate is not None
        y, gate = inner_unit(y), inner_unit(gate)
        dy = torch.empty(B, T, D, dtype=y.dtype, device=x.device)
        dtypes.append(gate.dtype)
    if bias is not None:
        dtypes.append(torch.float32)  # over the samples too, below
    shift = None if shift is None else inner_unit(shift)
    out = torch.empty((0,) if shift is None else (B, T, D), dtype=dout.dtype, device=x.device)
    chunks, rows = split_rows(B, T, 8)
    partials = torch.empty(len(dtypes), B, chunks, D, dtype=torch.float32, device=x.device)
    sizes = {t.element_size() for t in (dout, dsum, x, y, gate, shift, scale) if t is not None}
    main, tail, warps = backward_layout(D, min(sizes))
    # Without a limit the compiler takes more registers for the same instructions now and then, and fewer programs fit
    # on a multiprocessor. With tensors of several sizes these would not be enough.
    limited = len(sizes) == 1 and (bias is None or bias.element_size() >= min(sizes)) and main <= 256 * warps
    # Nor where there is everything, and a tail.
    limited = limited and not (tail and bias is not None and shift is not None)
    registers = (128 if tail else 96) if limited else None
    if mean is None:  # left alone, the compiler takes fewer than those, and spills only where it stops at 128
        registers = 136 if limited and tail and y is not None and warps <= 4 else None
    launch(
        _backward_kernel, (B * chunks,),
        dout, dsum, x, y, gate, None if bias is None else bias.contiguous(), shift, scale, mean, rstd,
        dx, None if y is None else dy, None if shift is None else out, partials,
        None if weight is None else weight.contiguous(),
        *_strides(dout), *_strides(dsum), *_strides(x), *_strides(y), 0 if gate is None else gate.stride(0),
        0 if shift is None else shift.stride(0), scale.stride(0), T, chunks, rows,
        D=D, MAIN=main, TAIL=tail, STAGES=stages(D), num_warps=warps, maxnreg=registers,
    )  # fmt: skip
    sums = finish(partials, dtypes)
    if bias is not None:
        sums[3] = finish(sums[3].view(1, 1, B, D), [bias.dtype])[0].view(D)
    return dx, dy, out, sums


@operation("soflow::layernorm_modulate")
def _layernorm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, out_dtype: torch.dtype, stats: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(x, None, None, shift, scale, None, eps, out_dtype, stats)[1:]


@_layernorm_modulate.register_fake
def _(x, shift, scale, eps, out_dtype, stats):
    mean = x.new_empty(x.shape[:2] if stats else 0, dtype=torch.float32)
    return x.new_empty(x.shape, dtype=out_dtype), mean, torch.empty_like(mean)


@operation("soflow::layernorm_modulate_backward")
def _layernorm_modulate_backward(
    dout: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx, _, _, (dshift, dscale) = _backward(dout, None, x, None, None, scale, None, mean, rstd)
    return dx, dshift, dscale


@_layernorm_modulate_backward.register_fake
def _(dout, x, scale, mean, rstd):
    return x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


@operation("soflow::gate_residual_layernorm_modulate")
def _gate_residual_layernorm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _forward(x, y, gate, shift, scale, bias, eps, out_dtype, stats)


@_gate_residual_layernorm_modulate.register_fake
def _(x, y, gate, shift, scale, bias, eps, out_dtype, stats):
    mean = x.new_empty(x.shape[:2] if stats else 0, dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=out_dtype), mean, torch.empty_like(mean)


@operation("soflow::gate_residual_layernorm_modulate_backward")
def _gate_residual_layernorm_modulate_backward(
    dout: Tensor, dsum: Tensor | None, x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, bias: Tensor | None,
    mean: Tensor, rstd: Tensor, shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx, dy, out, sums = _backward(dout, dsum, x, y, gate, scale, bias, mean, rstd, shift)
    dshift, dscale, dgate = sums[:3]
    return dx, dy, dgate, dshift, dscale, sums[3] if bias is not None else x.new_empty(0), out


@_gate_residual_layernorm_modulate_backward.register_fake
def _(dout, dsum, x, y, gate, scale, bias, mean, rstd, shift):
    dgate, dshift, dscale = (m.new_empty(m.shape) for m in (gate, scale, scale))
    dbias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    out = dout.new_empty(0 if shift is None else dout.shape)
    return x.new_empty(x.shape), y.new_empty(y.shape), dgate, dshift, dscale, dbias, out


def _save_layernorm_modulate(ctx, inputs, output):
    x, shift, scale, _, _, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, scale, mean, rstd)
    ctx.shift_dtype = shift.dtype
    # Otherwise autograd would fill a gradient of zeros for mean and rstd at every call.
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _layernorm_modulate_grad(ctx, dout, _mean, _rstd):
    if dout is None:
        return (None,) * 6
    dx, dshift, dscale = _layernorm_modulate_backward(dout, *ctx.saved_tensors)
    return dx, dshift.to(ctx.shift_dtype), dscale, None, None, None


def _save_gate_residual_layernorm_modulate(ctx, inputs, output):
    _, y, gate, shift, scale, bias, _, _, _ = inputs
    x, _, mean, rstd = output
    ctx.save_for_backward(x, y, gate, scale, bias, mean, rstd)
    ctx.shift_dtype, ctx.out_dtype = shift.dtype, output[1].dtype
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _gate_residual_layernorm_modulate_grad(ctx, dsum, dout, _mean, _rstd):
    if dsum is None and dout is None:
        return (None,) * 9
    x, y, gate, scale, bias, mean, rstd = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(x, dtype=ctx.out_dtype)
    dx, dy, dgate, dshift, dscale, dbias, _ = _gate_residual_layernorm_modulate_backward(
        dout, dsum, x, y, gate, scale, bias, mean, rstd, None
    )
    return dx, dy, dgate, dshift.to(ctx.shift_dtype), dscale, None if bias is None else dbias, None, None, None


_layernorm_modulate.register_autograd(_layernorm_modulate_grad, setup_context=_save_layernorm_modulate)
_gate_residual_layernorm_modulate.register_autograd(
    _gate_residual_layernorm_modulate_grad, setup_context=_save_gate_residual_layernorm_modulate
)


def _check(
    op: str, x: Tensor, tokens: dict[str, Any], rows: dict[str, Any], column: Any = None,
    out_dtype: torch.dtype | None = None, column_name: str = "bias",
) -> None:  # fmt: skip
    """Raise ValueError unless x and tokens are [B, T, D], rows [B, D], the column [D] or None, on one device."""
    check_tensor(op, "x", x, ("B", "T", "D"))
    B, T, D = x.shape
    for name, value in tokens.items():
        check_tensor(op, name, value, (B, T, D), x)
    for name, value in rows.items():
        check_tensor(op, name, value, (B, D), x)
    if column is not None:
        check_tensor(op, column_name, column, (D,), x)
    check_dtype(op, "out_dtype", out_dtype)


def layernorm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, out_dtype: torch.dtype | None = None
) -> Tensor:
    """LN(x) (1 + scale) + shift: LayerNorm without affine, then adaLN's modulation (arXiv 2212.09748, section 3.2).

    x: [B, T, D]; shift, scale: [B, D]; bfloat16, float16, float32 or float64, any strides (views with a contiguous last
    dimension, such as chunks of one modulation tensor, are taken without a copy). Returns [B, T, D] in `out_dtype`, by
    default the dtype of x. Differentiable in x, shift and scale. D above 8192, float64 and DTensors take the reference.
    Raises ValueError naming the argument whose type, shape, dtype or device is wrong.
    """
    _check("layernorm_modulate", x, {}, {"shift": shift, "scale": scale}, None, out_dtype)
    if not 0 < x.shape[2] <= MAX_D or not use_kernel(x, shift, scale):
        return layernorm_modulate_reference(x, shift, scale, eps, out_dtype)
    return _layernorm_modulate(x, shift, scale, eps, out_dtype or x.dtype, torch.is_grad_enabled())[0]


def gate_residual_layernorm_modulate(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x' = x + gate (y + bias) and LN(x') (1 + scale) + shift: what lies between two branches of an adaLN-Zero block.

    x, y: [B, T, D]; gate, shift, scale: [B, D]; bias: [D] or None, the bias of the product that made y, taken here so
    that its gradient falls out of the same pass; dtypes and strides as in `layernorm_modulate`. Returns x' [B, T, D] in
    the dtype of x, and its modulated norm in `out_dtype`, by default the dtype of x. Differentiable in every tensor.
    Source: arXiv 2212.09748, section 3.2. Raises ValueError naming the argument whose type, shape, dtype or device is
    wrong.
    """
    op = "gate_residual_layernorm_modulate"
    _check(op, x, {"y": y}, {"gate": gate, "shift": shift, "scale": scale}, bias, out_dtype)
    if not 0 < x.shape[2] <= MAX_D or not use_kernel(x, y, gate, shift, scale, bias):
        return gate_residual_layernorm_modulate_reference(x, y, gate, shift, scale, eps, bias, out_dtype)
    stats = torch.is_grad_enabled()  # a pass without gradient has no use for them
    return _gate_residual_layernorm_modulate(x, y, gate, shift, scale, bias, eps, out_dtype or x.dtype, stats)[:2]


def adaln_fwd(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float = 1e-6,
    bias: Tensor | None = None, out_dtype: torch.dtype | None = None,
) -> AdaLNForward:  # fmt: skip
    """x' = x + gate (y + bias), LN(x') (1 + scale) + shift, and the statistics that `adaln_bwd` takes.

    For an autograd node that covers a norm and the product after it: such a node need not keep the product's input
    [B, T, D], since its backward makes the norm again. y and gate may be None: then x' is x itself. Shapes, dtypes and
    errors as in `gate_residual_layernorm_modulate`. Not differentiable by itself.
    """
    tokens, rows = ({}, {}) if y is None else ({"y": y}, {"gate": gate})
    _check("adaln_fwd", x, tokens, {**rows, "shift": shift, "scale": scale}, bias, out_dtype)
    if not 0 < x.shape[2] <= MAX_D or not use_kernel(x, y, gate, shift, scale, bias):
        return adaln_fwd_reference(x, y, gate, shift, scale, eps, bias, out_dtype)
    out_dtype = out_dtype or x.dtype
    if y is None:
        return AdaLNForward(x, *_layernorm_modulate(x, shift, scale, eps, out_dtype, True))
    return AdaLNForward(*_gate_residual_layernorm_modulate(x, y, gate, shift, scale, bias, eps, out_dtype, True))


def adaln_bwd(
    dout: Tensor, dsum: Tensor | None, x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor,
    bias: Tensor | None, mean: Tensor, rstd: Tensor, eps: float = 1e-6, shift: Tensor | None = None,
) -> AdaLNGradients:  # fmt: skip
    """The gradients of `adaln_fwd` from those of its `out` and `sum`, both [B, T, D]; dsum None: no gradient came.

    x is the `sum` that `adaln_fwd` returned; mean and rstd came with it; the others are its arguments. With its shift,
    its `out` is made once more on the way. Not differentiable.
    Raises ValueError naming the argument whose type, shape, dtype or device is wrong.
    """
    tokens = {name: value for name, value in (("dout", dout), ("dsum", dsum), ("y", y)) if value is not None}
    rows = {name: value for name, value in (("gate", gate), ("shift", shift)) if value is not None}
    rows = {**rows, "scale": scale} if y is None else {"gate": gate, **rows, "scale": scale}
    _check("adaln_bwd", x, {"dout": dout, **tokens}, rows, bias)
    # Statistics of three dimensions are the reference's.
    by_reference = isinstance(mean, Tensor) and mean.dim() == 3
    for name, value in (("mean", mean), ("rstd", rstd)):
        check_tensor("adaln_bwd", name, value, (*x.shape[:2], 1) if by_reference else tuple(x.shape[:2]), x)
    if by_reference or not use_kernel(x, dout, dsum, y, gate, scale, bias, shift):
        return adaln_bwd_reference(dout, dsum, x, y, gate, scale, bias, mean, rstd, eps, shift)
    if y is None:
        dx, dshift, dscale = _layernorm_modulate_backward(dout, x, scale, mean, rstd)
        dx = dx if dsum is None else dx + dsum
        out = None if shift is None else layernorm_modulate(x, shift, scale, eps, dout.dtype)
        return AdaLNGradients(dx, None, None, dshift, dscale, None, out)
    dx, dy, dgate, dshift, dscale, dbias, out = _gate_residual_layernorm_modulate_backward(
        dout, dsum, x, y, gate, scale, bias, mean, rstd, shift
    )
    return AdaLNGradients(
        dx, dy, dgate, dshift, dscale, None if bias is None else dbias, None if shift is None else out
    )


def inspect_cases() -> Iterator[tuple[str, Callable]]:
    """(label, call): forward and backward at the shipped shapes, for `python -m soflow_kernels.inspect`. A program has
    one token where there are few, 8 or more where there are many."""
    sizes = ((256, 256), (32, 64))
    for (B, T), dtype, D in itertools.product(sizes, (torch.bfloat16, torch.float32), (768, 1024, 1152)):
        x, m, bias = (torch.empty(shape, dtype=dtype) for shape in ((B, T, D), (B, D), (D,)))
        stats = torch.empty(B, T)
        size = f"{B * T} x {D} {str(dtype)[6:]}"
        op = "layernorm_modulate"
        yield f"{op} {size}", partial(_forward, x, None, None, m, m, None, 1e-6, dtype, True)
        yield f"{op} backward {size}", partial(_backward, x, None, x, None, None, m, None, stats, stats)
        for b, name in ((None, ""), (bias, "+bias ")):
            op = "gate_residual_layernorm_modulate"
            yield f"{op} {name}{size}", partial(_forward, x, x, m, m, m, b, 1e-6, dtype, True)
            backward = partial(_backward, x, x, x, x, m, m, b, stats, stats)
            yield f"{op} backward {name}{size}", backward
            yield f"{op} backward and output {name}{size}", partial(backward, m)
