"""Value and increment side by side: how the pieces of a DiT change when their input changes by a little.

A pair is one tensor [2, ...]: the value h, and dh = h(end) - h(start) as a number of its own. Each operation gives the
pair of its result by an identity in which nothing cancels, in float32, so that the error of dh is relative to dh:

    sigma(z + dz) - sigma(z) = sigma(z + dz) sigma(-z) (1 - e^-dz)
    GELU, SiLU: h sigma(z(h)), so d = dh sigma(z + dz) + h dsigma;   z = 2 k (h + 0.044715 h^3), k = sqrt(2 / pi), or h
    LayerNorm: h / a centred, so d = dh / a' - h (a'^2 - a^2) / (a a' (a + a'))
    modulation: n (1 + scale) + shift, so d = dn (1 + scale + dscale) + n dscale + dshift
    gated residual: x + gate y, so d = dx + (gate + dgate) dy + dgate y
    sinusoids: cos(u + du) - cos(u) = -2 sin(u + du/2) sin(du/2), sin(u + du) - sin(u) = 2 cos(u + du/2) sin(du/2)

SoFlow (arXiv 2512.15657) divides the increment of its network by a time step of 0.002 and less; the difference of two
forwards in bfloat16 would be rounding error. Nothing here has a gradient.

Bytes, with S = one pass over a pair [2, B, T, D]: LayerNorm and modulation 2 S, gated residual with it 4 S, GELU and
SiLU 2 S. At 2 x 16 384 x 1152 (a quarter of a batch of 256 with 256 tokens) in bf16 S is 75 MB: 35 and 70 microseconds
at 4.3 TB/s.
"""

import itertools
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from soflow_kernels._dispatch import check_dtype, check_pair, check_quiet, inner_unit, jit, launch, tl, use_kernel
from soflow_kernels._rows import power_of_two
from soflow_kernels.time_embedding import cos_sin, frequency, split_step

LARGE = 0.5
"""Increments of an exponent above this are differenced directly: the identities would overflow, and nothing cancels."""
COLUMNS = 1024


def sigmoid_increment(z, dz):
    """sigmoid(z + dz) - sigmoid(z)."""
    end = torch.sigmoid(z + dz)
    small = -torch.expm1(-dz.clamp(-LARGE, LARGE)) * end * torch.sigmoid(-z)
    return torch.where(dz.abs() <= LARGE, small, end - torch.sigmoid(z))


def _wide(tensor):
    return tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)


def silu_increment_reference(x, dtype=None):
    """`silu_increment` in plain PyTorch: any device and dtype."""
    h, dh = _wide(x).unbind()
    out = torch.stack([F.silu(h), dh * torch.sigmoid(h + dh) + h * sigmoid_increment(h, dh)])
    return out.to(dtype or x.dtype)


def bias_gelu_increment_reference(x, bias=None, dtype=None):
    """`bias_gelu_increment` in plain PyTorch: any device and dtype."""
    h, dh = _wide(x).unbind()
    h = h if bias is None else h + bias.to(h.dtype)
    k, cubic = 2 * math.sqrt(2 / math.pi), 0.044715
    z = k * (h + cubic * h**3)
    dz = k * dh * (1 + cubic * (3 * h * h + 3 * h * dh + dh * dh))
    out = torch.stack([h * torch.sigmoid(z), dh * torch.sigmoid(z + dz) + h * sigmoid_increment(z, dz)])
    return out.to(dtype or x.dtype)


def layernorm_increment(h, dh, eps=1e-6):
    """LayerNorm over the last dimension without affine, and its increment."""
    h, dh = h - h.mean(-1, keepdim=True), dh - dh.mean(-1, keepdim=True)
    start = (h.square().mean(-1, keepdim=True) + eps).sqrt()
    dvar = (dh * (2 * h + dh)).mean(-1, keepdim=True)
    end = ((h + dh).square().mean(-1, keepdim=True) + eps).sqrt()
    return h / start, dh / end - h * dvar / (start * end * (start + end))


def layernorm_modulate_increment_reference(x, shift, scale, eps=1e-6, dtype=None):
    """`layernorm_modulate_increment` in plain PyTorch: any device and dtype."""
    n, dn = layernorm_increment(*_wide(x).unbind(), eps)
    (b, db), (a, da) = (_wide(m).unsqueeze(2).unbind() for m in (shift, scale))
    return torch.stack([n * (1 + a) + b, dn * (1 + a + da) + n * da + db]).to(dtype or x.dtype)


def gate_residual_layernorm_modulate_increment_reference(x, y, gate, shift, scale, bias=None, eps=1e-6, dtype=None):
    """`gate_residual_layernorm_modulate_increment` in plain PyTorch: any device and dtype."""
    (h, dh), (v, dv) = _wide(x).unbind(), _wide(y).unbind()
    g, dg = _wide(gate).unsqueeze(2).unbind()
    v = v if bias is None else v + bias.to(v.dtype)
    out = torch.stack([h + g * v, dh + (g + dg) * dv + dg * v]).to(x.dtype)
    return out, layernorm_modulate_increment_reference(out, shift, scale, eps, dtype)


def time_embedding_increment_reference(t, dt, s, frequencies=256, max_period=10_000.0, dtype=torch.float32):
    """`time_embedding_increment` in plain PyTorch: any device and dtype."""
    half = frequencies // 2
    t, dt, s = _wide(t), _wide(dt), _wide(s)
    w = torch.exp(-math.log(max_period) * (torch.arange(half, device=t.device, dtype=t.dtype) / half))
    angle = torch.stack([t, t - s])[..., None] * w
    step = dt[:, None] * w / 2
    middle, chord = angle + step, 2 * step.sin()
    value = torch.cat([angle.cos(), angle.sin()], -1)
    return torch.stack([value, torch.cat([-middle.sin() * chord, middle.cos() * chord], -1)]).to(dtype)


@jit
def expm1(x):
    """e^x - 1 for |x| <= 1/2."""
    poly = 1 + x * (1 / 8) * (1 + x * (1 / 9))
    poly = 1 + x * (1 / 6) * (1 + x * (1 / 7) * poly)
    poly = 1 + x * (1 / 4) * (1 + x * (1 / 5) * poly)
    return x * (1 + x * (1 / 2) * (1 + x * (1 / 3) * poly))


@jit
def _sigmoid(z):
    return 1 / (1 + tl.exp(-z))


@jit
def _gated(h, dh, z, dz):
    """h sigma(z) and its increment."""
    start = _sigmoid(z)
    end = _sigmoid(z + dz)
    near = tl.where(tl.abs(dz) <= 0.5, dz, 0.0)
    small = -expm1(-near) * end * _sigmoid(-z)
    # Comparisons that are false for NaN let it through by the difference.
    dsigma = tl.where(tl.abs(dz) <= 0.5, small, end - start)
    return h * start, dh * end + h * dsigma


@jit
def _pointwise_kernel(
    x_ptr, bias_ptr, out_ptr, N, D, plane_in, HAS_BIAS: tl.constexpr, GELU: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    mask = at < N
    h = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    dh = tl.load(x_ptr + plane_in + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        h += tl.load(bias_ptr + at % D, mask=mask, other=0.0).to(tl.float32)
    if GELU:
        z = 1.5957691216057308 * h * (1 + 0.044715 * h * h)
        dz = 1.5957691216057308 * dh * (1 + 0.044715 * (3 * h * h + 3 * h * dh + dh * dh))
    else:
        z = h
        dz = dh
    out, dout = _gated(h, dh, z, dz)
    tl.store(out_ptr + at, out, mask=mask)
    tl.store(out_ptr + N + at, dout, mask=mask)


@jit
def _norm_modulate(
    h, dh, shift_ptr, scale_ptr, out_ptr, cols, mask, b_row, shift_p, scale_p, shift_b, scale_b, row, plane, eps,
    D: tl.constexpr,
):  # fmt: skip
    h = tl.where(mask, h - tl.sum(h, axis=0) / D, 0.0)
    dh = tl.where(mask, dh - tl.sum(dh, axis=0) / D, 0.0)
    start = tl.sqrt(tl.sum(h * h, axis=0) / D + eps)
    end = tl.sqrt(tl.sum((h + dh) * (h + dh), axis=0) / D + eps)
    dvar = tl.sum(dh * (2 * h + dh), axis=0) / D
    n = h / start
    dn = dh / end - h * (dvar / (start * end * (start + end)))
    shift = tl.load(shift_ptr + b_row * shift_b + cols, mask=mask, other=0.0).to(tl.float32)
    dshift = tl.load(shift_ptr + shift_p + b_row * shift_b + cols, mask=mask, other=0.0).to(tl.float32)
    scale = 1 + tl.load(scale_ptr + b_row * scale_b + cols, mask=mask, other=0.0).to(tl.float32)
    dscale = tl.load(scale_ptr + scale_p + b_row * scale_b + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * D + cols, n * scale + shift, mask=mask)
    tl.store(out_ptr + plane + row * D + cols, dn * (scale + dscale) + n * dscale + dshift, mask=mask)


@jit
def _norm_kernel(
    x_ptr, shift_ptr, scale_ptr, out_ptr, x_p, x_b, x_t, shift_p, shift_b, scale_p, scale_b, T, plane, eps,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b = row // T
    cols = tl.arange(0, BLOCK)
    mask = cols < D
    at = x_ptr + b * x_b + (row % T) * x_t + cols
    h = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    dh = tl.load(at + x_p, mask=mask, other=0.0).to(tl.float32)
    _norm_modulate(
        h, dh, shift_ptr, scale_ptr, out_ptr, cols, mask, b, shift_p, scale_p, shift_b, scale_b, row, plane, eps, D
    )  # fmt: skip


@jit
def _boundary_kernel(
    x_ptr, y_ptr, gate_ptr, shift_ptr, scale_ptr, bias_ptr, res_ptr, out_ptr,
    x_p, x_b, x_t, y_p, y_b, y_t, gate_p, gate_b, shift_p, shift_b, scale_p, scale_b, T, plane, eps,
    D: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b = row // T
    t = row % T
    cols = tl.arange(0, BLOCK)
    mask = cols < D
    at = y_ptr + b * y_b + t * y_t + cols
    y = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(at + y_p, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + b * gate_b + cols, mask=mask, other=0.0).to(tl.float32)
    dgate = tl.load(gate_ptr + gate_p + b * gate_b + cols, mask=mask, other=0.0).to(tl.float32)
    at = x_ptr + b * x_b + t * x_t + cols
    h = tl.load(at, mask=mask, other=0.0).to(tl.float32) + gate * y
    dh = tl.load(at + x_p, mask=mask, other=0.0).to(tl.float32) + (gate + dgate) * dy + dgate * y
    # The norm is that of the residual as it is stored.
    h = h.to(res_ptr.dtype.element_ty)
    dh = dh.to(res_ptr.dtype.element_ty)
    tl.store(res_ptr + row * D + cols, h, mask=mask)
    tl.store(res_ptr + plane + row * D + cols, dh, mask=mask)
    _norm_modulate(
        h.to(tl.float32), dh.to(tl.float32), shift_ptr, scale_ptr, out_ptr, cols, mask, b,
        shift_p, scale_p, shift_b, scale_b, row, plane, eps, D,
    )  # fmt: skip


@jit
def _time_kernel(
    t_ptr, dt_ptr, s_ptr, out_ptr, step, step_rest, B, blocks, HALF: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: a block of frequencies of one sample, for both times."""
    program = tl.program_id(0).to(tl.int64)
    b = program // blocks
    i = (program % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    mask = i < HALF
    w = frequency(i.to(tl.float32), step, step_rest)
    t = tl.load(t_ptr + b).to(tl.float32)
    s = tl.load(s_ptr + b).to(tl.float32)
    half_step = tl.load(dt_ptr + b).to(tl.float32) * w * 0.5
    _, sine = cos_sin(half_step)
    for k in tl.static_range(2):
        angle = (t - k * s) * w
        cos, sin = cos_sin(angle)
        middle_cos, middle_sin = cos_sin(angle + half_step)
        row = out_ptr + (k * B + b) * (2 * HALF)
        tl.store(row + i, cos, mask=mask)
        tl.store(row + HALF + i, sin, mask=mask)
        row += 2 * B * (2 * HALF)
        tl.store(row + i, -2 * sine * middle_sin, mask=mask)
        tl.store(row + HALF + i, 2 * sine * middle_cos, mask=mask)


def _rows_layout(D):
    block = power_of_two(D)
    return block, min(max(block // 256, 1), 16)


@torch.library.custom_op("soflow::pointwise_increment", mutates_args=())
def _pointwise(x: Tensor, bias: Tensor | None, gelu: bool, dtype: torch.dtype) -> Tensor:
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    N = x[0].numel()
    launch(
        _pointwise_kernel, (-(-N // COLUMNS),),
        x, x if bias is None else bias.contiguous(), out, N, x.shape[-1], N,
        HAS_BIAS=bias is not None, GELU=gelu, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
    return out


@_pointwise.register_fake
def _(x, bias, gelu, dtype):
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.custom_op("soflow::layernorm_modulate_increment", mutates_args=())
def _norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
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


@_norm.register_fake
def _(x, shift, scale, eps, dtype):
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.custom_op("soflow::gate_residual_layernorm_modulate_increment", mutates_args=())
def _boundary(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, bias: Tensor | None, eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _, B, T, D = x.shape
    x, y, gate, shift, scale = (inner_unit(v) for v in (x, y, gate, shift, scale))
    res = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    block, warps = _rows_layout(D)
    launch(
        _boundary_kernel, (B * T,),
        x, y, gate, shift, scale, x if bias is None else bias.contiguous(), res, out,
        x.stride(0), x.stride(1), x.stride(2), y.stride(0), y.stride(1), y.stride(2),
        gate.stride(0), gate.stride(1), shift.stride(0), shift.stride(1), scale.stride(0), scale.stride(1),
        T, B * T * D, float(eps), D=D, HAS_BIAS=bias is not None, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return res, out


@_boundary.register_fake
def _(x, y, gate, shift, scale, bias, eps, dtype):
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype)


@torch.library.custom_op("soflow::time_embedding_increment", mutates_args=())
def _times(t: Tensor, dt: Tensor, s: Tensor, frequencies: int, max_period: float, dtype: torch.dtype) -> Tensor:
    B, half = t.shape[0], frequencies // 2
    out = torch.empty(2, 2, B, frequencies, dtype=dtype, device=t.device)
    blocks = -(-half // 128)
    launch(
        _time_kernel, (B * blocks,),
        t.contiguous(), dt.contiguous(), s.contiguous(), out, *split_step(max_period, half), B, blocks,
        HALF=half, COLUMNS=128, num_warps=1,
    )  # fmt: skip
    return out


@_times.register_fake
def _(t, dt, s, frequencies, max_period, dtype):
    return t.new_empty(2, 2, t.shape[0], frequencies, dtype=dtype)


def silu_increment(x, *, dtype=None):
    """SiLU of a pair [2, ...], as a pair of `dtype` (None: that of x). Source and identities: the module's docstring.

    bfloat16, float16, float32 or float64 (which takes the reference); no gradient.
    Raises ValueError naming the argument that is wrong or requires a gradient.
    """
    check_pair("silu_increment", "x", x, (..., "elements"))
    check_dtype("silu_increment", "dtype", dtype)
    if not use_kernel(x):
        return silu_increment_reference(x, dtype)
    return _pointwise(x, None, False, dtype or x.dtype)


def bias_gelu_increment(x, bias=None, *, dtype=None):
    """tanh GELU of a pair [2, ..., D] whose value lacks `bias` [D] (None: none), as a pair of `dtype` (None: of x's).

    bfloat16, float16, float32 or float64 (which takes the reference); no gradient.
    Raises ValueError naming the argument that is wrong or requires a gradient.
    """
    op = "bias_gelu_increment"
    check_pair(op, "x", x, (..., "D"))
    if bias is not None:
        check_quiet(op, "bias", bias, (x.shape[-1],), x)
    check_dtype(op, "dtype", dtype)
    if not use_kernel(x, bias):
        return bias_gelu_increment_reference(x, bias, dtype)
    return _pointwise(x, bias, True, dtype or x.dtype)


def layernorm_modulate_increment(x, shift, scale, *, eps=1e-6, dtype=None):
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
    return _norm(x, shift, scale, eps, dtype or x.dtype)


def gate_residual_layernorm_modulate_increment(x, y, gate, shift, scale, bias=None, *, eps=1e-6, dtype=None):
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
    return _boundary(x, y, gate, shift, scale, bias, eps, dtype or x.dtype)


def time_embedding_increment(t, dt, s, *, frequencies=256, max_period=10_000.0, dtype=None):
    """Sinusoids [cos, sin] of t and of t - s, and their increments for t -> t + dt: [2, 2, B, F], the pair first.

    t, dt, s: [B], not scaled; dtype: of the result, None: that of t. float64 takes the reference; no gradient.
    Raises ValueError naming the argument that is wrong or requires a gradient.
    """
    op = "time_embedding_increment"
    check_quiet(op, "t", t, ("B",))
    for name, value in (("dt", dt), ("s", s)):
        check_quiet(op, name, value, tuple(t.shape), t)
    check_dtype(op, "dtype", dtype)
    if isinstance(max_period, bool) or not isinstance(max_period, (int, float)) or not 1 <= max_period <= 1e30:
        raise ValueError(f"{op}: max_period must be a number in [1, 1e30], got {max_period!r}")
    if not isinstance(frequencies, int) or frequencies < 2 or frequencies % 2:
        raise ValueError(f"{op}: frequencies must be an even number above 0, got {frequencies!r}")
    if not use_kernel(t, dt, s):
        return time_embedding_increment_reference(t, dt, s, frequencies, max_period, dtype or t.dtype)
    return _times(t, dt, s, frequencies, float(max_period), dtype or t.dtype)


def inspect_cases():
    """(label, call): at the shipped shapes, for `python -m soflow_kernels.inspect`. "mixed": the residual in float32,
    everything else in bfloat16."""
    half, single = torch.bfloat16, torch.float32
    for (kind, wide, low), D in itertools.product(
        (("bfloat16", half, half), ("float32", single, single), ("mixed", single, half)), (768, 1024, 1152)
    ):
        x, y, m = (
            torch.zeros(2, 2, 16, D, dtype=wide),
            torch.zeros(2, 2, 16, D, dtype=low),
            torch.zeros(2, 2, D, dtype=low),
        )
        bias = torch.zeros(D, dtype=wide)
        yield f"layernorm_modulate_increment {D} {kind}", partial(_norm, x, m, m, 1e-6, low)
        call = partial(_boundary, x, y, m, m, m, bias, 1e-6, low)
        yield f"gate_residual_layernorm_modulate_increment {D} {kind}", call
        inner, wide_bias = torch.zeros(2, 32, 4 * D, dtype=low), torch.zeros(4 * D, dtype=wide)
        yield f"bias_gelu_increment {4 * D} {kind}", partial(_pointwise, inner, wide_bias, True, low)
        yield f"silu_increment {D} {kind}", partial(_pointwise, m, None, False, low)
    t = torch.zeros(64)
    yield "time_embedding_increment 256", partial(_times, t, t, t, 256, 1e4, single)
