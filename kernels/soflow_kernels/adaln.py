"""LayerNorm and adaLN-Zero modulation, alone and behind the gated residual sum (Peebles & Xie 2023, arXiv 2212.09748).

    layernorm_modulate                  out = LN(x) (1 + scale) + shift
    gate_residual_layernorm_modulate    x' = x + gate (y + bias);  out = LN(x') (1 + scale) + shift

LN(x) = (x - mean) / sqrt(var + eps) over the last dimension, without affine. x, y, x', out: [B, T, D]; gate, shift,
scale: [B, D], one row per sample; bias: [D] or None, the bias of the product that made y. Tensors are bfloat16, float16
or float32 and may differ in dtype; everything inside is float32, and the statistics are those of x' as it is stored.

Backward, with u = dout (1 + scale), h = LN(x'), c1 = mean(u) and c2 = mean(u h) over D, and dx' the incoming gradient:

    dx = rstd (u - c1 - h c2) + dx'      dy = gate dx             dgate = sum_t dx (y + bias)
    dshift = sum_t dout                  dscale = sum_t dout h    dbias = sum_bt dy

Bytes, with S = one pass over [B, T, D]: forward 2 S and 4 S; backward 3 S, and 6 S (4 reads, 2 writes). Partial sums
add `chunks` rows of [D] floats per sample and gradient. At 65 536 x 1152 in bf16 S is 151 MB, 0.035 ms at 4.3 TB/s:
floors of 0.07, 0.14, 0.11 and 0.21 ms. Kept for the backward: x', y, mean and rstd; h is recomputed.
"""

import itertools
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from soflow_kernels._dispatch import check_dtype, check_tensor, inner_unit, jit, launch, tl, use_kernel
from soflow_kernels._reduce import finish, split_rows
from soflow_kernels._rows import backward_layout, forward_layout, load, stages, store

MAX_D = 8192


def layernorm_modulate_reference(x, shift, scale, eps=1e-6, out_dtype=None):
    """`layernorm_modulate` in plain PyTorch: any device and dtype, any order of differentiation."""
    normed = F.layer_norm(x, x.shape[-1:], None, None, eps)
    return torch.addcmul(shift.unsqueeze(1), normed, 1 + scale.unsqueeze(1)).to(out_dtype or x.dtype)


def gate_residual_layernorm_modulate_reference(x, y, gate, shift, scale, eps=1e-6, bias=None, out_dtype=None):
    """`gate_residual_layernorm_modulate` in plain PyTorch: any device and dtype, any order of differentiation."""
    y = y if bias is None else y + bias
    x = torch.addcmul(x, gate.unsqueeze(1), y).to(x.dtype)
    return x, layernorm_modulate_reference(x, shift, scale, eps, out_dtype)


@jit
def _gated_sum(
    x, y_ptr, gate_ptr, bias_ptr, sum_ptr, cols, D: tl.constexpr, MASKED: tl.constexpr, HAS_BIAS: tl.constexpr
):
    y = load(y_ptr, cols, D, MASKED)
    if HAS_BIAS:
        y += load(bias_ptr, cols, D, MASKED)
    x = (x + load(gate_ptr, cols, D, MASKED) * y).to(sum_ptr.dtype.element_ty)
    store(sum_ptr, cols, x, D, MASKED)
    return x.to(tl.float32)


@jit
def _centre(x, mean, cols, D: tl.constexpr, MASKED: tl.constexpr):
    x = x - mean
    if MASKED:
        x = tl.where(cols < D, x, 0.0)
    return x


@jit
def _forward_kernel(
    x_ptr, y_ptr, gate_ptr, bias_ptr, shift_ptr, scale_ptr, sum_ptr, out_ptr, mean_ptr, rstd_ptr,
    x_b, x_t, y_b, y_t, gate_b, shift_b, scale_b, T, chunks, rows, eps,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    HAS_Y: tl.constexpr, HAS_BIAS: tl.constexpr, STATS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: `rows` tokens of one sample, whose modulation stays in registers."""
    PAD: tl.constexpr = MAIN > D
    PAD_TAIL: tl.constexpr = MAIN + TAIL > D
    program = tl.program_id(0).to(tl.int64)
    b = program // chunks
    first = (program % chunks) * rows
    cols = tl.arange(0, MAIN)
    scale = 1 + load(scale_ptr + b * scale_b, cols, D, PAD)
    shift = load(shift_ptr + b * shift_b, cols, D, PAD)
    if TAIL:
        tail = MAIN + tl.arange(0, TAIL)
        scale_tail = 1 + load(scale_ptr + b * scale_b, tail, D, PAD_TAIL)
        shift_tail = load(shift_ptr + b * shift_b, tail, D, PAD_TAIL)
    # With two stages the next token is on its way to shared memory while this one is computed.
    for t in tl.range(first, tl.minimum(first + rows, T), num_stages=STAGES):
        row = b * T + t
        x_row = x_ptr + b * x_b + t * x_t
        y_row = y_ptr + b * y_b + t * y_t
        sum_row = sum_ptr + row * D
        gate_row = gate_ptr + b * gate_b
        x = load(x_row, cols, D, PAD)
        if HAS_Y:
            x = _gated_sum(x, y_row, gate_row, bias_ptr, sum_row, cols, D, PAD, HAS_BIAS)
        total = tl.sum(x, axis=0)
        if TAIL:
            x_tail = load(x_row, tail, D, PAD_TAIL)
            if HAS_Y:
                x_tail = _gated_sum(x_tail, y_row, gate_row, bias_ptr, sum_row, tail, D, PAD_TAIL, HAS_BIAS)
            total += tl.sum(x_tail, axis=0)
        mean = total / D
        # The variance from the centred values: E[x^2] - mean^2 would cancel.
        x = _centre(x, mean, cols, D, PAD)
        square = tl.sum(x * x, axis=0)
        if TAIL:
            x_tail = _centre(x_tail, mean, tail, D, PAD_TAIL)
            square += tl.sum(x_tail * x_tail, axis=0)
        rstd = 1 / tl.sqrt(square / D + eps)
        if STATS:
            tl.store(mean_ptr + row, mean)
            tl.store(rstd_ptr + row, rstd)
        store(out_ptr + row * D, cols, x * rstd * scale + shift, D, PAD)
        if TAIL:
            store(out_ptr + row * D, tail, x_tail * rstd * scale_tail + shift_tail, D, PAD_TAIL)


@jit
def _finish_token(
    dx, dsum_ptr, y_ptr, gate, bias_ptr, dx_ptr, dy_ptr, dgate, dbias, cols,
    D: tl.constexpr, MASKED: tl.constexpr, HAS_Y: tl.constexpr, HAS_DSUM: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    if HAS_DSUM:
        dx += load(dsum_ptr, cols, D, MASKED)
    store(dx_ptr, cols, dx, D, MASKED)
    if HAS_Y:
        y = load(y_ptr, cols, D, MASKED)
        dy = dx * gate
        if HAS_BIAS:
            y += load(bias_ptr, cols, D, MASKED)
            dbias += dy
        dgate += dx * y
        store(dy_ptr, cols, dy, D, MASKED)
    return dgate, dbias


@jit
def _store_partials(
    partial_ptr, plane, cols, dshift, dscale, dgate, dbias,
    D: tl.constexpr, MASKED: tl.constexpr, HAS_Y: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    store(partial_ptr, cols, dshift, D, MASKED)
    store(partial_ptr + plane, cols, dscale, D, MASKED)
    if HAS_Y:
        store(partial_ptr + 2 * plane, cols, dgate, D, MASKED)
    if HAS_BIAS:
        store(partial_ptr + 3 * plane, cols, dbias, D, MASKED)


@jit
def _backward_kernel(
    dout_ptr, dsum_ptr, x_ptr, y_ptr, gate_ptr, bias_ptr, scale_ptr, mean_ptr, rstd_ptr, dx_ptr, dy_ptr, partial_ptr,
    dout_b, dout_t, dsum_b, dsum_t, x_b, x_t, y_b, y_t, gate_b, scale_b, T, chunks, rows, plane,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    HAS_Y: tl.constexpr, HAS_DSUM: tl.constexpr, HAS_BIAS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: `rows` tokens of one sample, whose sums over the tokens stay in registers until the end."""
    PAD: tl.constexpr = MAIN > D
    PAD_TAIL: tl.constexpr = MAIN + TAIL > D
    program = tl.program_id(0).to(tl.int64)
    b = program // chunks
    first = (program % chunks) * rows
    gate_row = gate_ptr + b * gate_b
    scale_row = scale_ptr + b * scale_b
    cols = tl.arange(0, MAIN)
    scale = 1 + load(scale_row, cols, D, PAD)
    dshift = tl.zeros([MAIN], tl.float32)
    dscale = tl.zeros([MAIN], tl.float32)
    dgate = tl.zeros([MAIN], tl.float32)
    dbias = tl.zeros([MAIN], tl.float32)
    gate = dgate
    if HAS_Y:
        gate = load(gate_row, cols, D, PAD)
    if TAIL:
        tail = MAIN + tl.arange(0, TAIL)
        scale_tail = 1 + load(scale_row, tail, D, PAD_TAIL)
        dshift_tail = tl.zeros([TAIL], tl.float32)
        dscale_tail = tl.zeros([TAIL], tl.float32)
        dgate_tail = tl.zeros([TAIL], tl.float32)
        dbias_tail = tl.zeros([TAIL], tl.float32)
        gate_tail = dgate_tail
        if HAS_Y:
            gate_tail = load(gate_row, tail, D, PAD_TAIL)
    for t in tl.range(first, tl.minimum(first + rows, T), num_stages=STAGES):
        row = b * T + t
        x_row = x_ptr + b * x_b + t * x_t
        y_row = y_ptr + b * y_b + t * y_t
        dout_row = dout_ptr + b * dout_b + t * dout_t
        dsum_row = dsum_ptr + b * dsum_b + t * dsum_t
        mean = tl.load(mean_ptr + row)
        rstd = tl.load(rstd_ptr + row)
        h = (load(x_row, cols, D, PAD) - mean) * rstd
        u = load(dout_row, cols, D, PAD)
        dshift += u
        dscale += u * h
        u *= scale
        sum_u = u
        sum_uh = u * h
        if TAIL:
            h_tail = (load(x_row, tail, D, PAD_TAIL) - mean) * rstd
            u_tail = load(dout_row, tail, D, PAD_TAIL)
            dshift_tail += u_tail
            dscale_tail += u_tail * h_tail
            u_tail *= scale_tail
            # A thread holds MAIN / TAIL neighbouring columns for each column of the tail: folding them first, in
            # registers, leaves one sum across the warps instead of two.
            sum_u = tl.sum(tl.reshape(sum_u, [TAIL, MAIN // TAIL]), axis=1) + u_tail
            sum_uh = tl.sum(tl.reshape(sum_uh, [TAIL, MAIN // TAIL]), axis=1) + u_tail * h_tail
        c1, c2 = tl.split(tl.sum(tl.join(sum_u, sum_uh), axis=0))
        c1 = c1 / D
        c2 = c2 / D
        dgate, dbias = _finish_token(
            rstd * (u - c1 - h * c2), dsum_row, y_row, gate, bias_ptr, dx_ptr + row * D, dy_ptr + row * D,
            dgate, dbias, cols, D, PAD, HAS_Y, HAS_DSUM, HAS_BIAS,
        )  # fmt: skip
        if TAIL:
            dgate_tail, dbias_tail = _finish_token(
                rstd * (u_tail - c1 - h_tail * c2), dsum_row, y_row, gate_tail, bias_ptr, dx_ptr + row * D,
                dy_ptr + row * D, dgate_tail, dbias_tail, tail, D, PAD_TAIL, HAS_Y, HAS_DSUM, HAS_BIAS,
            )  # fmt: skip
    partial_ptr += program * D
    _store_partials(partial_ptr, plane, cols, dshift, dscale, dgate, dbias, D, PAD, HAS_Y, HAS_BIAS)
    if TAIL:
        _store_partials(
            partial_ptr, plane, tail, dshift_tail, dscale_tail, dgate_tail, dbias_tail, D, PAD_TAIL, HAS_Y, HAS_BIAS
        )


def _forward(x, y, gate, shift, scale, bias, eps, out_dtype, stats):
    B, T, D = x.shape
    x, shift, scale = inner_unit(x), inner_unit(shift), inner_unit(scale)
    has_y, has_bias = y is not None, bias is not None
    y, gate = (inner_unit(y), inner_unit(gate)) if has_y else (x, scale)
    sums = torch.empty(B, T, D, dtype=x.dtype, device=x.device) if has_y else x
    out = torch.empty(B, T, D, dtype=out_dtype, device=x.device)
    mean = torch.empty((B, T) if stats else 0, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    # 8 tokens a program spread the loads of the modulation; fewer where that would leave the GPU idle.
    rows = min(8, max(1, B * T // 4096))
    chunks = -(-T // rows)
    main, tail, warps = forward_layout(D)
    launch(
        _forward_kernel, (B * chunks,),
        x, y, gate, bias.contiguous() if has_bias else x, shift, scale, sums, out, mean, rstd,
        x.stride(0), x.stride(1), y.stride(0), y.stride(1), gate.stride(0), shift.stride(0), scale.stride(0),
        T, chunks, rows, eps,
        D=D, MAIN=main, TAIL=tail, HAS_Y=has_y, HAS_BIAS=has_bias, STATS=stats, STAGES=stages(D),
        num_warps=warps,
    )  # fmt: skip
    return sums, out, mean, rstd


def _backward(dout, dsum, x, y, gate, scale, bias, mean, rstd):
    B, T, D = x.shape
    dout, x, scale = inner_unit(dout), inner_unit(x), inner_unit(scale)
    has_y, has_dsum, has_bias = y is not None, dsum is not None, bias is not None
    y, gate = (inner_unit(y), inner_unit(gate)) if has_y else (x, scale)
    dsum = inner_unit(dsum) if has_dsum else dout
    dx = torch.empty(B, T, D, dtype=x.dtype, device=x.device)
    dy = torch.empty(B, T, D, dtype=y.dtype, device=x.device) if has_y else dx
    chunks, rows = split_rows(B, T, 8)
    sums = 2 + has_y + has_bias
    partials = torch.empty(sums, B, chunks, D, dtype=torch.float32, device=x.device)
    main, tail, warps = backward_layout(D)
    launch(
        _backward_kernel, (B * chunks,),
        dout, dsum, x, y, gate, bias.contiguous() if has_bias else x, scale, mean, rstd, dx, dy, partials,
        dout.stride(0), dout.stride(1), dsum.stride(0), dsum.stride(1), x.stride(0), x.stride(1),
        y.stride(0), y.stride(1), gate.stride(0), scale.stride(0), T, chunks, rows, B * chunks * D,
        D=D, MAIN=main, TAIL=tail, HAS_Y=has_y, HAS_DSUM=has_dsum, HAS_BIAS=has_bias, STAGES=stages(D), num_warps=warps,
    )  # fmt: skip
    sums = finish(partials, [scale.dtype, scale.dtype, gate.dtype, torch.float32][:sums])
    if has_bias:  # over the samples too
        sums[3] = finish(sums[3].view(1, 1, B, D), [bias.dtype])[0].view(D)
    return dx, dy, sums


@torch.library.custom_op("soflow::layernorm_modulate", mutates_args=())
def _layernorm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, out_dtype: torch.dtype, stats: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(x, None, None, shift, scale, None, eps, out_dtype, stats)[1:]


@_layernorm_modulate.register_fake
def _(x, shift, scale, eps, out_dtype, stats):
    mean = x.new_empty(x.shape[:2] if stats else 0, dtype=torch.float32)
    return x.new_empty(x.shape, dtype=out_dtype), mean, torch.empty_like(mean)


@torch.library.custom_op("soflow::layernorm_modulate_backward", mutates_args=())
def _layernorm_modulate_backward(
    dout: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx, _, (dshift, dscale) = _backward(dout, None, x, None, None, scale, None, mean, rstd)
    return dx, dshift, dscale


@_layernorm_modulate_backward.register_fake
def _(dout, x, scale, mean, rstd):
    return x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


@torch.library.custom_op("soflow::gate_residual_layernorm_modulate", mutates_args=())
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


@torch.library.custom_op("soflow::gate_residual_layernorm_modulate_backward", mutates_args=())
def _gate_residual_layernorm_modulate_backward(
    dout: Tensor, dsum: Tensor | None, x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, bias: Tensor | None,
    mean: Tensor, rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx, dy, sums = _backward(dout, dsum, x, y, gate, scale, bias, mean, rstd)
    dshift, dscale, dgate = sums[:3]
    return dx, dy, dgate, dshift, dscale, sums[3] if bias is not None else x.new_empty(0)


@_gate_residual_layernorm_modulate_backward.register_fake
def _(dout, dsum, x, y, gate, scale, bias, mean, rstd):
    dgate, dshift, dscale = (m.new_empty(m.shape) for m in (gate, scale, scale))
    dbias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return x.new_empty(x.shape), y.new_empty(y.shape), dgate, dshift, dscale, dbias


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
    dx, dy, dgate, dshift, dscale, dbias = _gate_residual_layernorm_modulate_backward(
        dout, dsum, x, y, gate, scale, bias, mean, rstd
    )
    return dx, dy, dgate, dshift.to(ctx.shift_dtype), dscale, None if bias is None else dbias, None, None, None


_layernorm_modulate.register_autograd(_layernorm_modulate_grad, setup_context=_save_layernorm_modulate)
_gate_residual_layernorm_modulate.register_autograd(
    _gate_residual_layernorm_modulate_grad, setup_context=_save_gate_residual_layernorm_modulate
)


def layernorm_modulate(x, shift, scale, eps=1e-6, out_dtype=None):
    """LayerNorm over the last dimension, without affine, times 1 + scale, plus shift (adaLN, arXiv 2212.09748).

    x: [B, T, D]; shift, scale: [B, D]; bfloat16, float16, float32 or float64, any strides (views with a contiguous last
    dimension, such as chunks of one modulation tensor, are taken without a copy). Returns [B, T, D] in `out_dtype`, by
    default the dtype of x. Differentiable in x, shift and scale. D above 8192 and float64 take the reference.
    Raises ValueError naming the argument whose type, shape, dtype or device is wrong.
    """
    op = "layernorm_modulate"
    check_tensor(op, "x", x, ("B", "T", "D"))
    B, _, D = x.shape
    check_tensor(op, "shift", shift, (B, D), x)
    check_tensor(op, "scale", scale, (B, D), x)
    check_dtype(op, "out_dtype", out_dtype)
    if not 0 < D <= MAX_D or not use_kernel(x, shift, scale):
        return layernorm_modulate_reference(x, shift, scale, eps, out_dtype)
    return _layernorm_modulate(x, shift, scale, eps, out_dtype or x.dtype, torch.is_grad_enabled())[0]


def gate_residual_layernorm_modulate(x, y, gate, shift, scale, eps=1e-6, bias=None, out_dtype=None):
    """x' = x + gate (y + bias), and its LayerNorm modulated: the whole boundary between two branches of a DiT block.

    x, y: [B, T, D]; gate, shift, scale: [B, D]; bias: [D] or None, the bias of the product that made y, taken here so
    that its gradient falls out of the same pass; dtypes and strides as in `layernorm_modulate`. Returns x' [B, T, D] in
    the dtype of x, and its modulated norm in `out_dtype`, by default the dtype of x. Differentiable in every tensor.
    Raises ValueError naming the argument whose type, shape, dtype or device is wrong.
    """
    op = "gate_residual_layernorm_modulate"
    check_tensor(op, "x", x, ("B", "T", "D"))
    B, T, D = x.shape
    check_tensor(op, "y", y, (B, T, D), x)
    check_tensor(op, "gate", gate, (B, D), x)
    check_tensor(op, "shift", shift, (B, D), x)
    check_tensor(op, "scale", scale, (B, D), x)
    check_dtype(op, "out_dtype", out_dtype)
    if bias is not None:
        check_tensor(op, "bias", bias, (D,), x)
    if not 0 < D <= MAX_D or not use_kernel(x, y, gate, shift, scale, bias):
        return gate_residual_layernorm_modulate_reference(x, y, gate, shift, scale, eps, bias, out_dtype)
    stats = torch.is_grad_enabled()  # a pass without gradient has no use for them
    return _gate_residual_layernorm_modulate(x, y, gate, shift, scale, bias, eps, out_dtype or x.dtype, stats)[:2]


def inspect_cases():
    """(label, call): forward and backward at the shipped shapes, for `python -m soflow_kernels.inspect`."""
    for dtype, D in itertools.product((torch.bfloat16, torch.float32), (768, 1024, 1152)):
        x, m, bias = torch.zeros(2, 16, D, dtype=dtype), torch.zeros(2, D, dtype=dtype), torch.zeros(D, dtype=dtype)
        stats = torch.zeros(2, 16)
        size = f"{D} {str(dtype)[6:]}"
        op = "layernorm_modulate"
        yield f"{op} {size}", partial(_forward, x, None, None, m, m, None, 1e-6, dtype, True)
        yield f"{op} backward {size}", partial(_backward, x, None, x, None, None, m, None, stats, stats)
        for b, name in ((None, ""), (bias, "+bias ")):
            op = "gate_residual_layernorm_modulate"
            yield f"{op} {name}{size}", partial(_forward, x, x, m, m, m, b, 1e-6, dtype, True)
            yield f"{op} backward {name}{size}", partial(_backward, x, x, x, x, m, m, b, stats, stats)
