"""The increments of LayerNorm, modulation and gated residual (see the package), in float32:

    gated residual   x' = x + gate (y + bias), so dx' = dx + (gate + dgate) dy + dgate (y + bias)
    LayerNorm        h / a with h = x' centred and a = sqrt(mean(h^2) + eps), a' at the end,
                     so d = dh / a' - h (a'^2 - a^2) / (a a' (a + a'))
    modulation       n (1 + scale) + shift, so d = dn (1 + scale + dscale) + n dscale + dshift

x, dx, x', y, dy: [B, T, D]; gate, shift, scale and their increments: [B, D]; bias: [D]; bfloat16, float16 or float32,
each of its own. Values come from a forward that was made anyway; only increments are written. Bytes, with S = one pass
over [B, T, D] in bf16 and dx in float32: LayerNorm and modulation 4 S, gated residual with it 8 S. At 16 384 x 1152 (a
quarter of a batch of 256 with 256 tokens) S is 38 MB: 35 and 70 microseconds at 4.3 TB/s.
"""

import itertools
from functools import partial

import torch
from torch import Tensor

from soflow_kernels._dispatch import check_dtype, check_quiet, inner_unit, jit, launch, operation, tl, use_kernel
from soflow_kernels._rows import load, power_of_two, stages, store
from soflow_kernels.increment._pair import Pair, check_pair, wide


def layernorm_increment(h: Tensor, dh: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """LayerNorm over the last dimension without affine, and its increment."""
    h, dh = h - h.mean(-1, keepdim=True), dh - dh.mean(-1, keepdim=True)
    start = (h.square().mean(-1, keepdim=True) + eps).sqrt()
    dvar = (dh * (2 * h + dh)).mean(-1, keepdim=True)
    end = ((h + dh).square().mean(-1, keepdim=True) + eps).sqrt()
    return h / start, dh / end - h * dvar / (start * end * (start + end))


def layernorm_modulate_increment_reference(
    x: Pair, shift: Pair, scale: Pair, eps: float = 1e-6, dtype: torch.dtype | None = None
) -> Tensor:
    """`layernorm_modulate_increment` in plain PyTorch: any device and dtype."""
    (h, dh), (_, db), (a, da) = x, shift, scale
    n, dn = layernorm_increment(wide(h), wide(dh), eps)
    db, a, da = (wide(m).unsqueeze(1) for m in (db, a, da))
    return (dn * (1 + a + da) + n * da + db).to(dtype or dh.dtype)


def gate_residual_layernorm_modulate_increment_reference(
    total: Tensor, dx: Tensor, y: Pair, gate: Pair, shift: Pair, scale: Pair, bias: Tensor | None = None,
    eps: float = 1e-6, dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`gate_residual_layernorm_modulate_increment` in plain PyTorch: any device and dtype."""
    v, dv = wide(y[0]), wide(y[1])
    g, dg = wide(gate[0]).unsqueeze(1), wide(gate[1]).unsqueeze(1)
    v = v if bias is None else v + bias.to(v.dtype)
    dtotal = (wide(dx) + (g + dg) * dv + dg * v).to(dx.dtype)
    return dtotal, layernorm_modulate_increment_reference((total, dtotal), shift, scale, eps, dtype)


@jit
def _kernel(
    x_ptr, dx_ptr, y_ptr, dy_ptr, gate_ptr, dgate_ptr, bias_ptr, dshift_ptr, scale_ptr, dscale_ptr, dtotal_ptr, out_ptr,
    x_b, x_t, dx_b, dx_t, y_b, y_t, dy_b, dy_t, gate_b, dgate_b, dshift_b, scale_b, dscale_b, T, chunks, rows, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: `rows` tokens of sample b, one of the `chunks` that its T tokens make; a row of D columns is BLOCK
    wide. x is the residual at the norm. y_ptr None: nothing is added to it, and dtotal is not written.

    NAME_b, NAME_t: strides over samples and tokens. What is written is contiguous.
    """
    program = tl.program_id(0).to(tl.int64)
    b = program // chunks
    first = (program % chunks) * rows
    dshift = load(dshift_ptr + b * dshift_b, 0, BLOCK, D)
    scale = 1 + load(scale_ptr + b * scale_b, 0, BLOCK, D)
    dscale = load(dscale_ptr + b * dscale_b, 0, BLOCK, D)
    if y_ptr is not None:
        gate = load(gate_ptr + b * gate_b, 0, BLOCK, D)
        dgate = load(dgate_ptr + b * dgate_b, 0, BLOCK, D)
        moved = dgate * 0.0
        if bias_ptr is not None:
            moved = dgate * load(bias_ptr, 0, BLOCK, D)
    mask = tl.arange(0, BLOCK) < D
    # With two stages the next token is on its way to shared memory while this one is computed.
    for t in tl.range(first, tl.minimum(first + rows, T), num_stages=STAGES):
        row = (b * T + t) * D
        h = load(x_ptr + b * x_b + t * x_t, 0, BLOCK, D)
        dh = load(dx_ptr + b * dx_b + t * dx_t, 0, BLOCK, D)
        if y_ptr is not None:
            dy = load(dy_ptr + b * dy_b + t * dy_t, 0, BLOCK, D)
            y = load(y_ptr + b * y_b + t * y_t, 0, BLOCK, D)
            dh += (gate + dgate) * dy + (dgate * y + moved)  # pyright: ignore[reportOperatorIssue]
            # The norm is that of the residual as it is stored.
            dh = dh.to(dtotal_ptr.dtype.element_ty)
            store(dtotal_ptr + row, dh, 0, BLOCK, D)
            dh = dh.to(tl.float32)
        # Joined, two sums make one way across the warps.
        mean, dmean = tl.split(tl.sum(tl.join(h, dh), axis=0))
        h = tl.where(mask, h - mean / D, 0.0)
        dh = tl.where(mask, dh - dmean / D, 0.0)
        square, dsquare = tl.split(tl.sum(tl.join(h * h, dh * (2 * h + dh)), axis=0))
        dvar = dsquare / D
        start = tl.sqrt(square / D + eps)
        end = tl.sqrt(tl.maximum((square + dsquare) / D, 0.0, propagate_nan=tl.PropagateNan.ALL) + eps)
        n = h / start
        dn = dh / end - h * (dvar / (start * end * (start + end)))
        store(out_ptr + row, dn * (scale + dscale) + n * dscale + dshift, 0, BLOCK, D)


def _run(
    x: Tensor, dx: Tensor, y: Tensor | None, dy: Tensor | None, gate: Tensor | None, dgate: Tensor | None,
    bias: Tensor | None, dshift: Tensor, scale: Tensor, dscale: Tensor, dtotal: Tensor | None, out: Tensor, eps: float,
) -> None:  # fmt: skip
    B, T, D = x.shape
    given = [None if v is None else inner_unit(v) for v in (x, dx, y, dy, gate, dgate, bias, dshift, scale, dscale)]
    tokens = [(0, 0) if v is None else (v.stride(0), v.stride(1)) for v in given[:4]]
    samples = [0 if v is None else v.stride(0) for v in (given[4], given[5], *given[7:])]
    # A few tokens a program share the loads of the modulation; fewer where that would leave the GPU idle.
    rows = min(8, max(1, B * T // 4096))
    chunks = -(-T // rows)
    block = power_of_two(D)
    launch(
        _kernel, (B * chunks,),
        *given, dtotal, out, *itertools.chain(*tokens), *samples, T, chunks, rows, float(eps),
        D=D, BLOCK=block, STAGES=stages(D), num_warps=min(max(block // 256, 1), 16),
    )  # fmt: skip


@operation("soflow::layernorm_modulate_increment")
def _layernorm_modulate(
    x: Tensor, dx: Tensor, dshift: Tensor, scale: Tensor, dscale: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    _run(x, dx, None, None, None, None, None, dshift, scale, dscale, None, out, eps)
    return out


@_layernorm_modulate.register_fake
def _(x, dx, dshift, scale, dscale, eps, dtype):
    return x.new_empty(x.shape, dtype=dtype)


@operation("soflow::gate_residual_layernorm_modulate_increment")
def _gate_residual(
    total: Tensor, dx: Tensor, y: Tensor, dy: Tensor, gate: Tensor, dgate: Tensor, bias: Tensor | None, dshift: Tensor,
    scale: Tensor, dscale: Tensor, eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtotal = torch.empty(dx.shape, dtype=dx.dtype, device=dx.device)
    out = torch.empty(dx.shape, dtype=dtype, device=dx.device)
    _run(total, dx, y, dy, gate, dgate, bias, dshift, scale, dscale, dtotal, out, eps)
    return dtotal, out


@_gate_residual.register_fake
def _(total, dx, y, dy, gate, dgate, bias, dshift, scale, dscale, eps, dtype):
    return dx.new_empty(dx.shape), dx.new_empty(dx.shape, dtype=dtype)


def layernorm_modulate_increment(
    x: Pair, shift: Pair, scale: Pair, *, eps: float = 1e-6, dtype: torch.dtype | None = None
) -> Tensor:
    """The increment of LayerNorm(x) (1 + scale) + shift, [B, T, D] in `dtype` (None: that of the increment of x).

    x: a pair of [B, T, D]; shift, scale: pairs of [B, D]. bfloat16, float16, float32 or float64 (which takes the
    reference), any strides; no gradient.
    Raises ValueError naming the argument that is wrong or requires a gradient.
    """
    op = "layernorm_modulate_increment"
    h, dh = check_pair(op, "x", x, ("B", "T", "D"))
    B, _, D = h.shape
    _, dshift = check_pair(op, "shift", shift, (B, D), h)
    a, da = check_pair(op, "scale", scale, (B, D), h)
    check_dtype(op, "dtype", dtype)
    if not use_kernel(h, dh, dshift, a, da):
        return layernorm_modulate_increment_reference(x, shift, scale, eps, dtype)
    return _layernorm_modulate(h, dh, dshift, a, da, eps, dtype or dh.dtype)


def gate_residual_layernorm_modulate_increment(
    total: Tensor, dx: Tensor, y: Pair, gate: Pair, shift: Pair, scale: Pair, bias: Tensor | None = None, *,
    eps: float = 1e-6, dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The increments of x' = x + gate (y + bias) and of LayerNorm(x') (1 + scale) + shift, in one pass.

    total: x' itself, [B, T, D], which the forward has made; dx: the increment of x, [B, T, D]; y: a pair of [B, T, D];
    gate, shift, scale: pairs of [B, D]; bias: [D] or None, which the value of y lacks. Returns the increment of x' in
    the dtype of dx, and the modulated one in `dtype` (None: that of dx). bfloat16, float16, float32 or float64 (which
    takes the reference), any strides; no gradient.
    Raises ValueError naming the argument that is wrong or requires a gradient.
    """
    op = "gate_residual_layernorm_modulate_increment"
    check_quiet(op, "total", total, ("B", "T", "D"))
    B, _, D = total.shape
    check_quiet(op, "dx", dx, tuple(total.shape), total)
    pairs = [check_pair(op, "y", y, tuple(total.shape), total)]
    for name, value in (("gate", gate), ("shift", shift), ("scale", scale)):
        pairs.append(check_pair(op, name, value, (B, D), total))
    if bias is not None:
        check_quiet(op, "bias", bias, (D,), total)
    check_dtype(op, "dtype", dtype)
    (v, dv), (g, dg), (_, db), (a, da) = pairs
    if not use_kernel(total, dx, v, dv, g, dg, db, a, da, bias):
        return gate_residual_layernorm_modulate_increment_reference(
            total, dx, y, gate, shift, scale, bias, eps, dtype
        )  # fmt: skip
    return _gate_residual(total, dx, v, dv, g, dg, bias, db, a, da, eps, dtype or dx.dtype)


def inspect_cases():
    """(label, call): at the shipped shapes, for `python -m soflow_kernels.inspect`. "mixed": the increment of the
    residual in float32, everything else in bfloat16, as in training."""
    half, single = torch.bfloat16, torch.float32
    kinds = (("bfloat16", half, half), ("float32", single, single), ("mixed", single, half))
    for (kind, residual, low), D in itertools.product(kinds, (768, 1024, 1152)):
        dx, x = (torch.empty(64, 256, D, dtype=dtype) for dtype in (residual, low))
        m, bias = torch.empty(64, D, dtype=low), torch.empty(D, dtype=low)
        yield f"layernorm_modulate_increment {D} {kind}", partial(_layernorm_modulate, x, dx, m, m, m, 1e-6, low)
        call = partial(_gate_residual, x, dx, x, x, m, m, bias, m, m, m, 1e-6, low)
        yield f"gate_residual_layernorm_modulate_increment {D} {kind}", call
