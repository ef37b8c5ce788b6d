"""SiLU of the conditioning of a DiT with two times (arXiv 2212.09748, 2512.15657): out = SiLU(c),

    c = e_t(t) + e_s(t - s) + table[y],   e(u) = W2 SiLU(W1 phi(u) + b1) + b2,
    phi(u) = [cos(u w_i), sin(u w_i)],  w_i = max_period^(-2 i / F),  i < F / 2.

A network that sees a third number g, such as 1 - 1/w of a guidance scale w (arXiv 2512.02012), adds e_g(g) to c.

t, s, g: [B]; y: [B]; W1: [H, F]; b1: [H]; W2: [D, H]; b2: [D]; table: [classes + 1, D], its last row the null label;
out: [B, D]. bfloat16, float16 or float32, float32 inside; the products are torch's.

Launches, forward: phi of all times; a product for each; all b1 and SiLU, into one hidden tensor [B, 2 H], or [B, 3 H]
with g; the second weights side by side, and one product with them; all b2, the label's row and SiLU. Backward of the
last: d(c), then the sums of d(c) over each label and over all samples, in a fixed order. With B = 256 and H = D = 1152
in bf16 the weights are 6.5 MB and an activation is 0.6 MB: what counts is the number of launches. g adds a product to
the forward, and no other launch.

phi: w_i is within 1 ulp, by 2^x with an exponent split into an exact and a small part; sine and cosine are within
1.1e-7 of float64 for u in [0, 1], and 1e-7 |u| beyond, as good as float32 can say u w_i, up to |u| = 12 800: times
scaled by 1000, as in other trainers, are well within.
"""

import itertools
import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from soflow_kernels._dispatch import check_plain, check_tensor, inner_unit, jit, launch, operation, tl, use_kernel
from soflow_kernels._math import exp2, sincos
from soflow_kernels._reduce import finish

COLUMNS = 128
ROWS = 8
# A sum over the samples of a label looks at 32 labels, one for each thread of a warp, and reads rows only where one
# matches: most labels of a table have none.
LABEL_TILE = 32
MAX_FREQUENCIES = 8192
"""F of the kernel: below it, the exponents of w_i are products of two 12-bit numbers."""
MAX_PERIOD = 1e30
Weights = Sequence[Tensor]
"""(W1, b1, W2, b2) of one embedder."""


def dual_time_embedding_reference(
    t: Tensor, s: Tensor, y: Tensor | None, t_weights: Weights, s_weights: Weights, table: Tensor, *,
    g: Tensor | None = None, g_weights: Weights | None = None, max_period: float = 10_000.0,
) -> Tensor:  # fmt: skip
    """`dual_time_embedding` in plain PyTorch: any device and dtype, any order of differentiation."""
    wide = torch.float64 if torch.float64 in (t.dtype, s.dtype, table.dtype, t_weights[0].dtype) else torch.float32
    t, s = t.to(wide), s.to(wide)
    if y is None:
        y = torch.full(t.shape, table.shape[0] - 1, device=t.device)
    c = _embed(t, *t_weights, max_period) + _embed(t - s, *s_weights, max_period) + F.embedding(y, table)
    if g is not None and g_weights is not None:
        c = c + _embed(g.to(wide), *g_weights, max_period)
    return F.silu(c)


def _embed(u, W1, b1, W2, b2, max_period):
    half = W1.shape[1] // 2
    w = torch.exp(-math.log(max_period) * (torch.arange(half, device=u.device, dtype=u.dtype) / half))
    angle = u[:, None] * w
    phi = torch.cat([angle.cos(), angle.sin()], dim=1).to(W1.dtype)
    return F.linear(F.silu(F.linear(phi, W1, b1)), W2, b2)


@jit
def frequency(i, step, step_rest):
    """w_i = 2^(-i (step + step_rest)) for i below 2^12 and a step of 12 bits, so that i step is exact."""
    return exp2(-i * step, -i * step_rest)


# The kernels. A program does a tile: ROWS samples `rows` of B, and COLUMNS `cols` (or frequencies i) of HALF, H or D;
# a row of tiles has `blocks` of them. Names with t, s and g belong to the embedders of t, of t - s and of g, which are
# None where there is no g; a name like x_b is the stride of a pointer from one sample to the next.


@jit
def _store_sinusoids(angle, at, mask, HALF: tl.constexpr):
    sin, cos = sincos(angle)
    tl.store(at, cos, mask=mask)
    tl.store(at + HALF, sin, mask=mask)


@jit
def _sinusoids_kernel(
    t_ptr, s_ptr, g_ptr, out_ptr, t_b, s_b, g_b, step, step_rest, B, blocks,
    HALF: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    rows = (program // blocks) * ROWS + tl.arange(0, ROWS)[:, None]
    i = (program % blocks) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (rows < B) & (i < HALF)
    w = frequency(i.to(tl.float32), step, step_rest)
    t = tl.load(t_ptr + rows * t_b, mask=rows < B, other=0.0).to(tl.float32)
    s = tl.load(s_ptr + rows * s_b, mask=rows < B, other=0.0).to(tl.float32)
    _store_sinusoids(t * w, out_ptr + rows * (2 * HALF) + i, mask, HALF)
    _store_sinusoids((t - s) * w, out_ptr + (rows + B) * (2 * HALF) + i, mask, HALF)
    if g_ptr is not None:
        g = tl.load(g_ptr + rows * g_b, mask=rows < B, other=0.0).to(tl.float32)
        _store_sinusoids(g * w, out_ptr + (rows + 2 * B) * (2 * HALF) + i, mask, HALF)


@jit
def _silu(u):
    return u / (1 + tl.exp(-u))


@jit
def _silu_slope(u):
    # The slope is 0 below -80, where the exponential would soon overflow; the comparison lets NaN through.
    u = tl.where(u < -80, -80.0, u)
    e = tl.exp(-u)
    s = 1 / (1 + e)
    return s * (1 + u * (e * s))


@jit
def _biased(row_ptr, bias_ptr, cols, mask, H: tl.constexpr):
    bias = tl.load(bias_ptr + cols, mask=cols < H, other=0.0).to(tl.float32)
    return tl.load(row_ptr + cols, mask=mask, other=0.0).to(tl.float32) + bias


@jit
def _hidden_kernel(
    ht_ptr, hs_ptr, hg_ptr, bt_ptr, bs_ptr, bg_ptr, out_ptr, ht_b, hs_b, hg_b, B, blocks,
    H: tl.constexpr, EMBEDDERS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    rows = (program // blocks) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = (program % blocks) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (rows < B) & (cols < H)
    at = out_ptr + rows * (EMBEDDERS * H) + cols
    tl.store(at, _silu(_biased(ht_ptr + rows * ht_b, bt_ptr, cols, mask, H)), mask=mask)
    tl.store(at + H, _silu(_biased(hs_ptr + rows * hs_b, bs_ptr, cols, mask, H)), mask=mask)
    if hg_ptr is not None:
        tl.store(at + 2 * H, _silu(_biased(hg_ptr + rows * hg_b, bg_ptr, cols, mask, H)), mask=mask)


@jit
def _hidden_gradient(dout_ptr, h_ptr, bias_ptr, dh_ptr, partial_ptr, rows, cols, h_b, mask, H: tl.constexpr):
    u = _biased(h_ptr + rows * h_b, bias_ptr, cols, mask, H)
    dout = tl.load(dout_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    dh = dout * _silu_slope(u)
    tl.store(dh_ptr + rows * H + cols, dh, mask=mask)
    tl.store(partial_ptr + cols, tl.sum(dh, axis=0)[None, :], mask=cols < H)


@jit
def _hidden_backward_kernel(
    dout_ptr, ht_ptr, hs_ptr, hg_ptr, bt_ptr, bs_ptr, bg_ptr, dht_ptr, dhs_ptr, dhg_ptr, partial_ptr,
    dout_b, ht_b, hs_b, hg_b, B, blocks, plane,
    H: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dh of each embedder, [B, H], and its sums over the ROWS samples of chunk after chunk, [2 or 3, chunks, H]
    float32: `plane` is chunks H, from the sums of one embedder to those of the next."""
    program = tl.program_id(0).to(tl.int64)
    chunk = program // blocks
    rows = chunk * ROWS + tl.arange(0, ROWS)[:, None]
    cols = (program % blocks) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (rows < B) & (cols < H)
    dout, sums = dout_ptr + rows * dout_b, partial_ptr + chunk * H
    _hidden_gradient(dout, ht_ptr, bt_ptr, dht_ptr, sums, rows, cols, ht_b, mask, H)
    _hidden_gradient(dout + H, hs_ptr, bs_ptr, dhs_ptr, sums + plane, rows, cols, hs_b, mask, H)
    if hg_ptr is not None:
        _hidden_gradient(dout + 2 * H, hg_ptr, bg_ptr, dhg_ptr, sums + 2 * plane, rows, cols, hg_b, mask, H)


@jit
def _tail_kernel(
    x_ptr, bt_ptr, bs_ptr, bg_ptr, table_ptr, y_ptr, dout_ptr, out_ptr, x_b, table_v, y_b, dout_b, B, V, blocks,
    D: tl.constexpr, HAS_Y: tl.constexpr, BACKWARD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """SiLU(c), or d(c). x: the products, [B, D]; table: V rows with stride table_v, without labels the null row alone.

    A label outside the table reads nothing and makes its row NaN.
    """
    program = tl.program_id(0).to(tl.int64)
    first = (program // blocks) * ROWS
    rows = first + tl.arange(0, ROWS)[:, None]
    cols = (program % blocks) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (rows < B) & (cols < D)
    c = tl.load(x_ptr + rows * x_b + cols, mask=mask, other=0.0).to(tl.float32)
    c += tl.load(bt_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    c += tl.load(bs_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    if bg_ptr is not None:
        c += tl.load(bg_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    if HAS_Y:
        b = first + tl.arange(0, ROWS)
        label = tl.load(y_ptr + b * y_b, mask=b < B, other=0)[:, None]
        known = (label >= 0) & (label < V)
        c += tl.load(table_ptr + label * table_v + cols, mask=mask & known, other=float("nan")).to(tl.float32)
    else:
        c += tl.load(table_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    if BACKWARD:
        out = tl.load(dout_ptr + rows * dout_b + cols, mask=mask, other=0.0).to(tl.float32) * _silu_slope(c)
    else:
        out = _silu(c)
    tl.store(out_ptr + rows * D + cols, out, mask=mask)


@jit
def _label_sums_kernel(
    dc_ptr, y_ptr, dtable_ptr, dbias_ptr, y_b, B, V, blocks,
    D: tl.constexpr, HAS_Y: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program sums d(c) over the samples of label v; v = V stands for all samples, the gradient of the biases."""
    program = tl.program_id(0).to(tl.int64)
    v = program // blocks
    cols = (program % blocks) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, B, ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)
        hit = rows < B
        if HAS_Y:
            label = tl.load(y_ptr + rows * y_b, mask=rows < B, other=0)
            hit = hit & ((label == v) | (v == V))
        else:
            hit = hit & (v >= V - 1)
        if tl.max(hit.to(tl.int32)) > 0:
            at = rows[:, None] * D + cols
            total += tl.load(dc_ptr + at, mask=hit[:, None] & (cols < D), other=0.0).to(tl.float32)
    total = tl.sum(total, axis=0)[None, :]
    if v == V:
        tl.store(dbias_ptr + cols, total, mask=cols < D)
    else:
        tl.store(dtable_ptr + v * D + cols, total, mask=cols < D)


def split_step(max_period: float, half: int) -> tuple[float, float]:
    """log2(max_period) / half, the step of the exponents of w_i, as 12 exact bits and the rest."""
    step = math.log2(max_period) / half
    mantissa, exponent = math.frexp(step)
    exact = math.ldexp(round(mantissa * 4096), exponent - 12)
    return exact, step - exact


@operation("soflow::time_sinusoids")
def _sinusoids(
    t: Tensor, s: Tensor, frequencies: int, max_period: float, dtype: torch.dtype, g: Tensor | None = None
) -> Tensor:
    B, half = t.shape[0], frequencies // 2
    out = torch.empty(2 if g is None else 3, B, frequencies, dtype=dtype, device=t.device)
    blocks = -(-half // COLUMNS)
    launch(
        _sinusoids_kernel, (-(-B // ROWS) * blocks,),
        t, s, g, out, t.stride(0), s.stride(0), None if g is None else g.stride(0), *split_step(max_period, half), B,
        blocks, HALF=half, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
    return out


@_sinusoids.register_fake
def _(t, s, frequencies, max_period, dtype, g=None):
    return t.new_empty(2 if g is None else 3, t.shape[0], frequencies, dtype=dtype)


@operation("soflow::dual_bias_silu")
def _hidden(
    ht: Tensor, hs: Tensor, bt: Tensor, bs: Tensor, hg: Tensor | None = None, bg: Tensor | None = None
) -> Tensor:
    (B, H), embedders = ht.shape, 2 if hg is None else 3
    ht, hs, hg = inner_unit(ht), inner_unit(hs), None if hg is None else inner_unit(hg)
    out = torch.empty(B, embedders * H, dtype=ht.dtype, device=ht.device)
    blocks = -(-H // COLUMNS)
    launch(
        _hidden_kernel, (-(-B // ROWS) * blocks,),
        ht, hs, hg, *_dense(bt, bs, bg), out, *_strides(ht, hs, hg), B, blocks,
        H=H, EMBEDDERS=embedders, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
    return out


@_hidden.register_fake
def _(ht, hs, bt, bs, hg=None, bg=None):
    return ht.new_empty(ht.shape[0], (2 if hg is None else 3) * ht.shape[1])


def _dense(*biases):
    return (None if bias is None else bias.contiguous() for bias in biases)


def _strides(*rows):
    return (None if each is None else each.stride(0) for each in rows)


@operation("soflow::dual_bias_silu_backward")
def _hidden_backward(
    dout: Tensor, ht: Tensor, hs: Tensor, bt: Tensor, bs: Tensor, hg: Tensor | None = None, bg: Tensor | None = None
) -> list[Tensor]:
    """The gradients of ht, hs, bt and bs, and of hg and bg where they are given."""
    B, H = ht.shape
    dout = inner_unit(dout)
    ht, hs, hg = inner_unit(ht), inner_unit(hs), None if hg is None else inner_unit(hg)
    dht, dhs, *dhg = (torch.empty(B, H, dtype=h.dtype, device=h.device) for h in (ht, hs, hg) if h is not None)
    chunks, blocks = -(-B // ROWS), -(-H // COLUMNS)
    dtypes = [bias.dtype for bias in (bt, bs, bg) if bias is not None]
    partials = torch.empty(len(dtypes), 1, chunks, H, dtype=torch.float32, device=ht.device)
    launch(
        _hidden_backward_kernel, (chunks * blocks,),
        dout, ht, hs, hg, *_dense(bt, bs, bg), dht, dhs, dhg[0] if dhg else None, partials,
        dout.stride(0), *_strides(ht, hs, hg), B, blocks, chunks * H,
        H=H, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
    # With three sums of 32 at a time the registers that sm_100's compiler takes are too few.
    dbt, dbs, *dbg = (bias.view(H) for bias in finish(partials, dtypes, 64 if hg is None else 16))
    return [dht, dhs, dbt, dbs, *dhg, *dbg]


@_hidden_backward.register_fake
def _(dout, ht, hs, bt, bs, hg=None, bg=None):
    return [v.new_empty(v.shape) for v in (ht, hs, bt, bs, hg, bg) if v is not None]


def _launch_tail(x, bt, bs, bg, table, y, dout, out):
    B, D = x.shape
    x, given = inner_unit(x), inner_unit(x if dout is None else dout)
    table = inner_unit(table if y is not None else table[-1:])
    blocks = -(-D // COLUMNS)
    launch(
        _tail_kernel, (-(-B // ROWS) * blocks,),
        x, *_dense(bt, bs, bg), table, x if y is None else y, given, out,
        x.stride(0), table.stride(0), 0 if y is None else y.stride(0), given.stride(0), B, table.shape[0], blocks,
        D=D, HAS_Y=y is not None, BACKWARD=dout is not None, ROWS=ROWS, COLUMNS=COLUMNS,
        num_warps=2 * out.element_size(),  # one row and 16 bytes a thread
    )  # fmt: skip


@operation("soflow::label_bias_silu")
def _tail(x: Tensor, bt: Tensor, bs: Tensor, table: Tensor, y: Tensor | None, bg: Tensor | None = None) -> Tensor:
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, table.dtype), device=x.device)
    _launch_tail(x, bt, bs, bg, table, y, None, out)
    return out


@_tail.register_fake
def _(x, bt, bs, table, y, bg=None):
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, table.dtype))


@operation("soflow::label_bias_silu_backward")
def _tail_backward(
    dout: Tensor, x: Tensor, bt: Tensor, bs: Tensor, table: Tensor, y: Tensor | None, bg: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    (B, D), V = x.shape, table.shape[0]
    dc = torch.empty(B, D, dtype=dout.dtype, device=x.device)
    _launch_tail(x, bt, bs, bg, table, y, dout, dc)
    dtable = torch.empty(V, D, dtype=table.dtype, device=x.device)
    dbias = torch.empty(D, dtype=bt.dtype, device=x.device)
    blocks = -(-D // LABEL_TILE)
    launch(
        _label_sums_kernel, ((V + 1) * blocks,),
        dc, dc if y is None else y, dtable, dbias, 0 if y is None else y.stride(0), B, V, blocks,
        D=D, HAS_Y=y is not None, ROWS=LABEL_TILE, COLUMNS=LABEL_TILE, num_warps=1,
    )  # fmt: skip
    return dc, dbias, dtable


@_tail_backward.register_fake
def _(dout, x, bt, bs, table, y, bg=None):
    return dout.new_empty(dout.shape), bt.new_empty(bt.shape), table.new_empty(table.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _hidden_grad(ctx, dout):
    found = _hidden_backward(dout, *ctx.saved_tensors)
    return *found, *(None,) * (6 - len(found))


def _tail_grad(ctx, dout):
    x, _, bs, _, _, bg = ctx.saved_tensors
    dc, dbias, dtable = _tail_backward(dout, *ctx.saved_tensors)
    return dc.to(x.dtype), dbias, dbias.to(bs.dtype), dtable, None, None if bg is None else dbias.to(bg.dtype)


_hidden.register_autograd(_hidden_grad, setup_context=_save)
_tail.register_autograd(_tail_grad, setup_context=_save)


def _check(op, t, s, y, t_weights, s_weights, table, g, g_weights, max_period):
    check_tensor(op, "t", t, ("B",))
    check_plain(op, "t", t)
    embedders = {"t_weights": t_weights, "s_weights": s_weights}
    if g is None and g_weights is not None:
        raise ValueError(f"{op}: g must come with g_weights")
    if g is not None:
        check_tensor(op, "g", g, tuple(t.shape), t)
        check_plain(op, "g", g)
        embedders["g_weights"] = g_weights
    check_tensor(op, "s", s, tuple(t.shape), t)
    check_plain(op, "s", s)
    if y is not None:
        if not isinstance(y, Tensor) or y.dtype != torch.int64:
            raise ValueError(f"{op}: y must be an int64 tensor, got {getattr(y, 'dtype', type(y).__name__)}")
        if y.shape != t.shape or y.device != t.device:
            raise ValueError(f"{op}: y must be [{t.shape[0]}] on {t.device}, got {list(y.shape)} on {y.device}")
    for name, weights in embedders.items():
        if not isinstance(weights, (tuple, list)) or len(weights) != 4:
            raise ValueError(f"{op}: {name} must be a tuple (W1, b1, W2, b2), got {type(weights).__name__}")
    check_tensor(op, "t_weights[0]", t_weights[0], ("H", "F"), t)
    H, frequencies = t_weights[0].shape
    if frequencies == 0 or frequencies % 2:
        raise ValueError(f"{op}: t_weights[0] must be [H, F] with an even F above 0, got F = {frequencies}")
    check_tensor(op, "t_weights[2]", t_weights[2], ("D", H), t)
    D = t_weights[2].shape[0]
    dtype = None if torch.is_autocast_enabled(t.device.type) else t_weights[0].dtype
    for name, weights in embedders.items():
        for i, shape in enumerate(((H, frequencies), (H,), (D, H), (D,))):
            check_tensor(op, f"{name}[{i}]", weights[i], shape, t)
            if dtype not in (None, weights[i].dtype):
                raise ValueError(f"{op}: {name}[{i}] must be {dtype} like t_weights[0], got {weights[i].dtype}")
    check_tensor(op, "table", table, ("classes + 1", D), t)
    if table.shape[0] == 0:
        raise ValueError(f"{op}: table must have a row for the null label, got none")
    if not isinstance(max_period, (int, float)) or not 1 <= max_period <= MAX_PERIOD:
        raise ValueError(f"{op}: max_period must be a number from 1 to {MAX_PERIOD}, got {max_period!r}")


def dual_time_embedding(
    t: Tensor, s: Tensor, y: Tensor | None, t_weights: Weights, s_weights: Weights, table: Tensor, *,
    g: Tensor | None = None, g_weights: Weights | None = None, max_period: float = 10_000.0,
) -> Tensor:  # fmt: skip
    """SiLU(e_t(t) + e_s(t - s) + table[y]), the conditioning of a DiT with two times, [B, D]; with g, e_g(g) is added.

    t, s, g: [B], not scaled, taken in float32; y: [B] int64, None: the last row of the table, the null label.
    t_weights, s_weights, g_weights: (W1 [H, F], b1 [H], W2 [D, H], b2 [D]) as torch.nn.Linear holds them, of one dtype
    unless under autocast; table: [classes + 1, D]. Returns the promoted dtype of products and table. Differentiable in
    all weights, biases and the table; t, s or g that require a gradient take the reference, and so does float64.
    On the kernel a label outside the table gives a row of NaN; the reference raises IndexError on a CPU.
    Raises ValueError naming the argument whose type, shape, dtype, device or value is wrong.
    """
    _check("dual_time_embedding", t, s, y, t_weights, s_weights, table, g, g_weights, max_period)
    embedders = [weights for weights in (t_weights, s_weights, g_weights) if weights is not None]
    times = [time for time in (t, s, g) if time is not None]
    W1 = t_weights[0]
    by_kernel = (
        use_kernel(*times, *(value for weights in embedders for value in weights), table)
        and W1.shape[1] <= MAX_FREQUENCIES
        and not (torch.is_grad_enabled() and any(time.requires_grad for time in times))
    )
    if not by_kernel:
        return dual_time_embedding_reference(
            t, s, y, t_weights, s_weights, table, g=g, g_weights=g_weights, max_period=max_period
        )
    device = t.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else W1.dtype
    third = None if g is None else g.detach()
    phi = _sinusoids(t.detach(), s.detach(), W1.shape[1], float(max_period), dtype, third).unbind()
    h = [F.linear(each, weights[0]) for each, weights in zip(phi, embedders, strict=True)]
    b1, W2, b2 = ([weights[i] for weights in embedders] for i in (1, 2, 3))
    hidden = _hidden(h[0], h[1], b1[0], b1[1], *h[2:], *b1[2:])
    return _tail(F.linear(hidden, torch.cat(W2, dim=1)), b2[0], b2[1], table, y, *b2[2:])


def inspect_cases():
    """(label, call): every launch at the shipped shapes, for `python -m soflow_kernels.inspect`. "autocast": products
    in bfloat16, parameters in float32; "three": with a third number beside the times."""
    half, single = torch.bfloat16, torch.float32
    kinds = (("bfloat16", half, half), ("float32", single, single), ("autocast", half, single))
    for (kind, dtype, stored), D, B in itertools.product(kinds, (768, 1024, 1152), (32, 256)):
        t, x, b = torch.empty(B), torch.empty(B, D, dtype=dtype), torch.empty(D, dtype=stored)
        table, out = (torch.empty(shape, dtype=stored) for shape in ((1001, D), (B, D)))
        for embedders, three in ((2, ""), (3, "three ")):
            g, hg, bg = (t, x, b) if three else (None, None, None)
            wide, size = torch.empty(B, embedders * D, dtype=dtype), f"{three}{B} x {D} {kind}"
            yield f"time_embedding sinusoids {size}", partial(_sinusoids, t, t, 256, 1e4, dtype, g)
            yield f"time_embedding hidden {size}", partial(_hidden, x, x, b, b, hg, bg)
            yield f"time_embedding hidden backward {size}", partial(_hidden_backward, wide, x, x, b, b, hg, bg)
            for y, name in ((torch.empty(B, dtype=torch.int64), ""), (None, "null ")):
                yield f"time_embedding tail {name}{size}", partial(_tail, x, b, b, table, y, bg)
                yield (
                    f"time_embedding tail backward {name}{size}",
                    partial(_tail_backward, out, x, b, b, table, y, bg),
                )
