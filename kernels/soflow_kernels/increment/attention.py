"""Attention on a pair: O = P v and dO = dP v + (P + dP) dv in one kernel, with no T x T matrix in memory.

    S = scale q k',   dS = scale (dq (k + dk)' + q dk'),   P = softmax(S),   dP = softmax(S + dS) - softmax(S)

A pair is [2, ...], value and increment (see the package). With the maxima m of a row of S and m + c of S + dS,

    w = e^(S-m),   dw = w (e^(dS-c) - 1),   A = sum w v,   Z = sum w,   Y = sum dw,   D = sum dw v + (w + dw) dv

O = A / Z and dO = (D - (Y / Z) A) / (Z + Y): one pass over the keys. e^x - 1 is a polynomial where x is small and a
difference where it is not. Softmax does not see c; it takes out of dS what all keys of a row have in common, so that
what cancels between D and (Y / Z) A is no larger than the rest. As m and c move to m' and c', with r = e^(m-m'),

    A' = r A,   D' = r (e^(c-c') D + (e^(c-c') - 1) A),   Z and Y likewise.

q, k, v: [2, B, H, T, d] bfloat16 or float32; products take operands of that dtype and accumulate in float32, the rest
is float32. Six products of T x T x d where the forward alone has two. Bytes: q and the output once, k and v once for
every block of queries, from the cache. SoFlow: arXiv 2512.15657.
"""

import itertools
from functools import partial

import torch
from torch import Tensor

from soflow_kernels._dispatch import INTERPRETED, check_pair, inner_unit, jit, launch, tl, use_kernel
from soflow_kernels._math import expm1
from soflow_kernels._rows import power_of_two
from soflow_kernels.increment._sigmoid import LARGE

MAX_HEAD_DIM = 128


def softmax_increment(scores: Tensor, dscores: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(S) and softmax(S + dS) - softmax(S) over the last dimension: P (e^dS - Z) / Z with Z = sum P e^dS."""
    p = torch.softmax(scores, -1)
    # Softmax does not see a shift; the rest is as small as it gets.
    dscores = dscores - (p * dscores).sum(-1, keepdim=True)
    growth = torch.expm1(dscores.clamp(-LARGE, LARGE))
    mean = (p * growth).sum(-1, keepdim=True)
    small = p * (growth - mean) / (1 + mean)
    near = dscores.abs().amax(-1, keepdim=True) <= LARGE
    return p, torch.where(near, small, torch.softmax(scores + dscores, -1) - p)


def attention_increment_reference(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """`attention_increment` in plain PyTorch: any device and dtype."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    (q0, dq), (k0, dk), (v0, dv) = ((part.to(wide)).unbind() for part in (q, k, v))
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scale * (q0 @ k0.transpose(-1, -2))
    dscores = scale * (dq @ (k0 + dk).transpose(-1, -2) + q0 @ dk.transpose(-1, -2))
    p, dp = softmax_increment(scores, dscores)
    out = torch.stack([p @ v0, dp @ v0 + (p + dp) @ dv]).to(v.dtype)
    return out.transpose(2, 3).contiguous().transpose(2, 3)  # [2, B, T, H, d] in memory


@jit
def _rows(ptr, pair_stride, rows, row_stride, cols, T, D: tl.constexpr):
    """Value and increment of some rows, [rows, cols]; 0 outside."""
    mask = (rows < T)[:, None] & (cols < D)[None, :]
    at = ptr + rows.to(tl.int64)[:, None] * row_stride + cols[None, :]
    return tl.load(at, mask=mask, other=0.0), tl.load(at + pair_stride, mask=mask, other=0.0)


@jit
def _difference(start, end, x):
    """end - start, where end is e^x times start."""
    near = tl.where(tl.abs(x) <= 0.5, x, 0.0)
    return tl.where(tl.abs(x) <= 0.5, start * expm1(near), end - start)


@jit
def _dot(a, b, total, WIDEN: tl.constexpr):
    """total + a b. The interpreter cannot multiply bfloat16 (WIDEN); in float32 the products are the same."""
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision="ieee")


@jit
def _scores(q, dq, k, dk, scores, dscores, WIDEN: tl.constexpr):
    k_end = (k.to(tl.float32) + dk.to(tl.float32)).to(k.dtype)
    scores = _dot(q, tl.trans(k), scores, WIDEN)
    dscores = _dot(dq, tl.trans(k_end), dscores, WIDEN)
    return scores, _dot(q, tl.trans(dk), dscores, WIDEN)


@jit
def _add_values(A, D, w, dw, w_end, v, dv, WIDEN: tl.constexpr):
    A = _dot(w, v, A, WIDEN)
    D = _dot(dw, v, D, WIDEN)
    return A, _dot(w_end, dv, D, WIDEN)


@jit
def _write(out_ptr, plane, rows, row_stride, cols, T, A, D, Z, Y, HD: tl.constexpr):
    mask = (rows < T)[:, None] & (cols < HD)[None, :]
    at = out_ptr + rows.to(tl.int64)[:, None] * row_stride + cols[None, :]
    tl.store(at, A / Z[:, None], mask=mask)
    tl.store(at + plane, (D - (Y / Z)[:, None] * A) / (Z + Y)[:, None], mask=mask)


@jit
def _kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, q_p, q_b, q_h, q_t, k_p, k_b, k_h, k_t, v_p, v_b, v_h, v_t,
    out_plane, H, T, blocks, scale,
    HD: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    UNIT: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One program: M queries `rows` of head h of sample b, of `blocks` such blocks; N keys at a time.

    HD: the head dimension d, MAIN and TAIL columns (0: none), as 72 = 64 + 8. m, c, Z, Y, A, D: as in the header, A and
    D also for the tail. Strides q_p (from value to increment), q_b, q_h, q_t are in UNITs of elements, so that the
    compiler sees what they are multiples of; out_plane is the output's, in elements. WIDEN: see `_dot`.
    """
    program = tl.program_id(0).to(tl.int64)
    head = program // blocks
    b = head // H
    h = head % H
    q_ptr += (b * q_b + h * q_h) * UNIT
    k_ptr += (b * k_b + h * k_h) * UNIT
    v_ptr += (b * v_b + h * v_h) * UNIT
    rows = (program % blocks) * M + tl.arange(0, M)
    main = tl.arange(0, MAIN)
    q, dq = _rows(q_ptr, q_p * UNIT, rows, q_t * UNIT, main, T, HD)
    A = tl.zeros([M, MAIN], tl.float32)
    D = tl.zeros([M, MAIN], tl.float32)
    if TAIL:
        tail = MAIN + tl.arange(0, TAIL)
        q_tail, dq_tail = _rows(q_ptr, q_p * UNIT, rows, q_t * UNIT, tail, T, HD)
        A_tail = tl.zeros([M, TAIL], tl.float32)
        D_tail = tl.zeros([M, TAIL], tl.float32)
    m = tl.full([M], float("-inf"), tl.float32)
    c = tl.zeros([M], tl.float32)
    Z = tl.zeros([M], tl.float32)
    Y = tl.zeros([M], tl.float32)
    for first in range(0, T, N):
        keys = first + tl.arange(0, N)
        k, dk = _rows(k_ptr, k_p * UNIT, keys, k_t * UNIT, main, T, HD)
        scores = tl.zeros([M, N], tl.float32)
        dscores = tl.zeros([M, N], tl.float32)
        scores, dscores = _scores(q, dq, k, dk, scores, dscores, WIDEN)
        if TAIL:
            k, dk = _rows(k_ptr, k_p * UNIT, keys, k_t * UNIT, tail, T, HD)
            scores, dscores = _scores(q_tail, dq_tail, k, dk, scores, dscores, WIDEN)
        scores = tl.where((keys < T)[None, :], scores * scale, float("-inf"))
        dscores = dscores * scale
        new_m = tl.maximum(m, tl.max(scores, axis=1))
        new_c = tl.maximum(m + c, tl.max(scores + dscores, axis=1)) - new_m
        c = tl.where(m == float("-inf"), new_c, c)  # nothing was summed up yet
        r = tl.exp(m - new_m)
        r_end = tl.exp((m - new_m) + (c - new_c))
        between = _difference(r, r_end, c - new_c)
        m = new_m
        c = new_c
        w = tl.exp(scores - m[:, None])
        dscores -= c[:, None]
        w_end = tl.exp(scores - m[:, None] + dscores)
        dw = _difference(w, w_end, dscores)
        Y = r_end * Y + between * Z + tl.sum(dw, axis=1)
        Z = r * Z + tl.sum(w, axis=1)
        D = r_end[:, None] * D + between[:, None] * A
        A = r[:, None] * A
        w = w.to(q.dtype)
        w_end = w_end.to(q.dtype)
        dw = dw.to(q.dtype)
        v, dv = _rows(v_ptr, v_p * UNIT, keys, v_t * UNIT, main, T, HD)
        A, D = _add_values(A, D, w, dw, w_end, v, dv, WIDEN)
        if TAIL:
            v, dv = _rows(v_ptr, v_p * UNIT, keys, v_t * UNIT, tail, T, HD)
            D_tail = r_end[:, None] * D_tail + between[:, None] * A_tail
            A_tail, D_tail = _add_values(r[:, None] * A_tail, D_tail, w, dw, w_end, v, dv, WIDEN)
    out_ptr += (b * T * H + h) * HD
    _write(out_ptr, out_plane, rows, H * HD, main, T, A, D, Z, Y, HD)
    if TAIL:
        _write(out_ptr, out_plane, rows, H * HD, tail, T, A_tail, D_tail, Z, Y, HD)


def layout(d, element_size):
    """(MAIN, TAIL, M, N, warps) of a head dimension: a product's side is at least 16 and a power of two."""
    main = max(16, power_of_two(d + 1) // 2)
    tail = max(16, power_of_two(d - main)) if d > main else 0
    if tail >= main or main + tail == 2 * main:
        main, tail = 2 * main, 0
    # Two accumulators, several tiles of scores and six operands must fit the registers.
    if element_size == 4:
        return main, tail, 32, 16, 8 if main + tail <= 64 else 16
    return main, tail, 64, 32, 8


@torch.library.custom_op("soflow::attention_increment", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    _, B, H, T, d = q.shape
    q, k, v = inner_unit(q), inner_unit(k), inner_unit(v)
    out = torch.empty(2, B, T, H, d, dtype=v.dtype, device=v.device)
    main, tail, M, N, warps = layout(d, q.element_size())
    blocks = -(-T // M)
    strides = [stride for part in (q, k, v) for stride in part.stride()[:4]]
    unit = 8 if all(stride % 8 == 0 for stride in strides) else 1
    launch(
        _kernel, (B * H * blocks,),
        q, k, v, out, *(stride // unit for stride in strides),
        B * T * H * d, H, T, blocks, float(scale), HD=d, MAIN=main, TAIL=tail, M=M, N=N,
        UNIT=unit, WIDEN=INTERPRETED, num_warps=warps, num_stages=1,
    )  # fmt: skip
    return out.transpose(2, 3)


@_attention.register_fake
def _(q, k, v, scale):
    _, B, H, T, d = q.shape
    return v.new_empty(2, B, T, H, d).transpose(2, 3)


def attention_increment(q, k, v, *, scale: float | None = None) -> Tensor:
    q, k, v = (torch.stack([a.to(b.dtype), b]) for a, b in (q, k, v))
    return _attention_increment(q, k, v, scale=scale)[1]


def _attention_increment(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """Attention of pairs: the pair of softmax(scale q k') v, [2, B, H, T, d] in the dtype of v.

    q, k, v: pairs [2, B, H, T, d] of one dtype, any strides, views of one [2, B, T, 3, H, d] tensor without a copy;
    scale: None is d^-0.5. bfloat16 and float32 go to the kernel for d up to 128; float16, whose range increments leave,
    float64 and larger heads take the reference. The result lies in memory as [2, B, T, H, d], so that
    `.transpose(2, 3).flatten(3)` copies nothing. No gradient.
    Raises ValueError naming the argument that is wrong or requires a gradient.
    """
    op = "attention_increment"
    check_pair(op, "q", q, ("2", "B", "H", "T", "d"))
    for name, value in (("k", k), ("v", v)):
        check_pair(op, name, value, tuple(q.shape), q)
        if value.dtype != q.dtype:
            raise ValueError(f"{op}: {name} must be {q.dtype} like q, got {value.dtype}")
    if 0 in q.shape:
        return v.new_empty(v.shape).transpose(2, 3).contiguous().transpose(2, 3)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    fits = q.dtype != torch.float16 and q.shape[-1] <= MAX_HEAD_DIM
    if not (fits and use_kernel(q, k, v)):
        return attention_increment_reference(q, k, v, scale)
    return _attention(q, k, v, scale)


def inspect_cases():
    """(label, call): at the shipped shapes, for `python -m soflow_kernels.inspect`."""
    sizes = ((64, 64), (256, 64), (256, 72), (1024, 72), (256, 96))
    for dtype, (T, d) in itertools.product((torch.bfloat16, torch.float32), sizes):
        qkv = torch.zeros(2, 1, T, 3, 2, d, dtype=dtype)
        q, k, v = (part.transpose(2, 3) for part in qkv.unbind(3))
        yield f"attention_increment {T} x {d} {str(dtype)[6:]}", partial(_attention, q, k, v, d**-0.5)
