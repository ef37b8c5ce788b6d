"""The increment of attention, dO = dP v + (P + dP) dv, in one kernel, with no T x T matrix in memory.

    S = scale q k',   dS = scale (dq k' + (q + dq) dk'),   P = softmax(S),   P + dP = softmax(S + dS)

q, k, v are pairs, value and increment (see the package). With the maxima m of a row of S and m + c of S + dS,

    w = e^(S-m),   dw = w (e^(dS-c) - 1),   A = sum w v,   Z = sum w,   Y = sum dw,   D = sum dw v + (w + dw) dv

dO = (D - (Y / Z) A) / (Z + Y): one pass over the keys. e^x - 1 is a polynomial where x is small and a difference where
it is not. Softmax does not see c; it takes out of dS what all keys of a row have in common, so that what cancels
between D and (Y / Z) A is no larger than the rest. As m and c move to m' and c', with r = e^(m-m'),

    A' = r A,   D' = r (e^(c-c') D + (e^(c-c') - 1) A),   Z and Y likewise.

In the kernel exponents are of 2, and S is (S + dS) - dS: both ends share (q + dq) dk'.

q, dq, k, dk, v, dv: [B, H, T, d] bfloat16 or float32, all of one dtype; products take operands of that dtype and
accumulate in float32, the rest is float32. Six products of T x T x d, 12 B H T T d operations, where the forward alone
has two. Bytes, with S = one pass over [B, H, T, d]: q and dq once, k, dk, v and dv once for every block of queries, of
which the cache gives all but the first, and dO: 7 S. SoFlow: arXiv 2512.15657.
"""

import itertools
import math
from functools import partial

import torch
from torch import Tensor

from soflow_kernels._dispatch import INTERPRETED, inner_unit, jit, launch, operation, tl, use_kernel
from soflow_kernels._rows import power_of_two
from soflow_kernels.increment._pair import Pair, check_pair, wide

MAX_HEAD_DIM = 128
PIECE = 2**17
"""Scores at a time of the reference on a CPU: what it makes of them stays in the cache."""
SMALL = 0.5
"""Increments of scores up to which the reference takes e^x - 1 itself."""


def attention_increment_reference(q: Pair, k: Pair, v: Pair, scale: float | None = None) -> Tensor:
    """`attention_increment` in plain PyTorch: any device and dtype.

    In bfloat16, on a CPU that has such products, the increments of scores and the sums over values take them.
    """
    parts = (*q, *k, *v)
    heads, T, d = parts[0].shape[1:]
    scale = float(d**-0.5 if scale is None else scale)
    # A CPU of which the tensors are plain, and no graph that the loop would unroll in.
    if parts[0].device.type == "cpu" and type(parts[0]) is Tensor and not torch.compiler.is_compiling():
        samples = max(1, PIECE // max(1, heads * T**2))
        pieces = zip(*(part.split(samples) for part in parts), strict=True)
        out = torch.cat([_increment(*piece, scale=scale) for piece in pieces])
    else:
        out = _increment(*parts, scale=scale)
    return out.transpose(1, 2).contiguous().transpose(1, 2)  # [B, T, H, d] in memory


def _increment(q: Tensor, dq: Tensor, k: Tensor, dk: Tensor, v: Tensor, dv: Tensor, scale: float) -> Tensor:
    """By the formulas above, with all keys of a row at hand: w and dw up to their factor, c from the maxima."""
    dtype, work = dv.dtype, wide(q).dtype
    low = q.dtype == torch.bfloat16 and q.device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    operand = torch.bfloat16 if low else work
    scores = (q.to(work) * scale) @ k.to(work).transpose(-1, -2)
    moves, keys = torch.cat((dq, q + dq), -1).to(operand), torch.cat((k, dk), -1).to(operand)
    dscores = (moves @ keys.transpose(-1, -2)).to(work).mul_(scale)
    most, ends = scores.amax(-1, keepdim=True), scores + dscores
    last = ends.amax(-1, keepdim=True)
    w, w_end = scores.sub_(most).exp_(), ends.sub_(last).exp_()
    dscores.sub_(last - most)
    # A difference of exponentials where the increment is not small: nothing cancels in it there, and where w is 0 in
    # the dtype while w_end is not, it is right.
    small = dscores.clamp(-SMALL, SMALL)
    dw = torch.where(small == dscores, small.expm1_().mul_(w), w_end - w)
    mean = dw.sum(-1, keepdim=True) / w.sum(-1, keepdim=True)
    total = w_end.sum(-1, keepdim=True)
    weights = dw.addcmul_(w, mean, value=-1).to(operand)
    return (((weights @ v.to(operand)).to(work) + w_end.to(operand) @ dv.to(operand)) / total).to(dtype)


@jit
def _head(ptr, b, h, b_stride, h_stride, UNIT: tl.constexpr):
    """Where head h of sample b begins. From here on addresses are of int64: a stride may be of 2^31 elements."""
    return ptr + (b.to(tl.int64) * b_stride + h.to(tl.int64) * h_stride) * UNIT


@jit
def _tile(
    ptr, rows, row_stride: tl.constexpr, T, FIRST: tl.constexpr, WIDTH: tl.constexpr, HD: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Columns FIRST to FIRST + WIDTH of some rows, [rows, WIDTH]; 0 past HD columns and, unless EVEN, past T rows."""
    cols = FIRST + tl.arange(0, WIDTH)
    at = ptr + (rows.to(tl.int64)[:, None] * row_stride + cols[None, :])
    if EVEN and FIRST + WIDTH <= HD:
        tile = tl.load(at)
    elif EVEN:
        tile = tl.load(at, mask=(cols < HD)[None, :], other=0.0)
    else:
        tile = tl.load(at, mask=(cols < HD)[None, :] & (rows < T)[:, None], other=0.0)
    return tile


@jit
def _tails(
    ptr, d_ptr, rows, row_stride: tl.constexpr, d_row_stride: tl.constexpr, T, MAIN: tl.constexpr, TAIL: tl.constexpr,
    HD: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The columns from MAIN on of a value and of its increment side by side, [rows, 2 TAIL]; 0 outside."""
    cols = tl.arange(0, 2 * TAIL)
    wide = rows.to(tl.int64)[:, None]
    at = ptr + (wide * row_stride + (MAIN + cols % TAIL)[None, :])
    d_at = d_ptr + (wide * d_row_stride + (MAIN + cols % TAIL)[None, :])
    mask = (MAIN + cols % TAIL < HD)[None, :]
    if not EVEN:
        mask = mask & (rows < T)[:, None]
    return tl.load(tl.where((cols < TAIL)[None, :], at, d_at), mask=mask, other=0.0)


@jit
def _difference(start, end, x, FINE: tl.constexpr):
    """end - start, where end is 2^x times start."""
    series = 0.2402265069591007 + x * 0.05550410866482158
    if FINE:
        series = 0.2402265069591007 + x * (0.05550410866482158 + x * (0.009618129107628477 + x * 0.0013333558146428443))
    series = 0.6931471805599453 + x * series
    return tl.where(tl.abs(x) <= 0.25, start * x * series, end - start)


@jit
def _dot(a, b, total, WIDEN: tl.constexpr):
    """total + a b. The interpreter cannot multiply bfloat16 (WIDEN); in float32 the products are the same."""
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision="ieee")


@jit
def _add_values(A, D, w, dw, w_end, v, dv, WIDEN: tl.constexpr):
    A = _dot(w, v, A, WIDEN)
    D = _dot(dw, v, D, WIDEN)
    return A, _dot(w_end, dv, D, WIDEN)


@jit
def _write(out_ptr, rows, row_stride, T, A, D, Z, Y, FIRST: tl.constexpr, WIDTH: tl.constexpr, HD: tl.constexpr):
    cols = FIRST + tl.arange(0, WIDTH)
    mask = (rows < T)[:, None] & (cols < HD)[None, :]
    at = out_ptr + rows.to(tl.int64)[:, None] * row_stride + cols[None, :]
    tl.store(at, (D - (Y / Z)[:, None] * A) / (Z + Y)[:, None], mask=mask)


@jit
def _kernel(
    q_ptr, dq_ptr, k_ptr, dk_ptr, v_ptr, dv_ptr, out_ptr, q_b, q_h, dq_b, dq_h, k_b, k_h,
    dk_b, dk_h, v_b, v_h, dv_b, dv_h, H, T, blocks, rate,
    Q_T: tl.constexpr, DQ_T: tl.constexpr, K_T: tl.constexpr, DK_T: tl.constexpr, V_T: tl.constexpr, DV_T: tl.constexpr,
    HD: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    UNIT: tl.constexpr, EVEN: tl.constexpr, FINE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One program: M queries, from `row` on, of head h of sample b, of `blocks` such blocks; N keys at a time.

    HD: the head dimension d, MAIN and TAIL columns (0: none), as 72 = 64 + 8. m, c, Z, Y, A, D: as in the header, m and
    c as exponents of 2, A and D also for the tail; rate: scale times log2(e). Strides of samples and heads, q_b, q_h,
    are in UNITs of elements, so that the compiler sees what they are multiples of; those of rows, Q_T, are constants,
    which saves a register for every 16 bytes that a thread loads. EVEN: T is a multiple of N. FINE: more terms of the
    series than bfloat16 shows. WIDEN: see `_dot`.
    """
    program = tl.program_id(0)
    b = program // (blocks * H)
    h = program // blocks % H
    row = program % blocks * M
    q_ptr = _head(q_ptr, b, h, q_b, q_h, UNIT)
    dq_ptr = _head(dq_ptr, b, h, dq_b, dq_h, UNIT)
    k_ptr = _head(k_ptr, b, h, k_b, k_h, UNIT)
    dk_ptr = _head(dk_ptr, b, h, dk_b, dk_h, UNIT)
    v_ptr = _head(v_ptr, b, h, v_b, v_h, UNIT)
    dv_ptr = _head(dv_ptr, b, h, dv_b, dv_h, UNIT)
    out_ptr += ((b.to(tl.int64) * T + row) * H + h) * HD
    q_ptr += tl.cast(row, tl.int64) * Q_T
    dq_ptr += tl.cast(row, tl.int64) * DQ_T
    rows = tl.arange(0, M)
    left = T - row
    keys = tl.arange(0, N)
    q = _tile(q_ptr, rows, Q_T, left, 0, MAIN, HD, False)
    dq = _tile(dq_ptr, rows, DQ_T, left, 0, MAIN, HD, False)
    q_end = (q.to(tl.float32) + dq.to(tl.float32)).to(q.dtype)
    A = tl.zeros([M, MAIN], tl.float32)
    D = tl.zeros([M, MAIN], tl.float32)
    if TAIL:
        # Beside [k, dk] for the tail of the keys: [q_end, q_end] gives both ends, [dq, q_end] the increment.
        tail = _tails(q_ptr, q_ptr, rows, Q_T, Q_T, left, MAIN, TAIL, HD, False)
        dtail = _tails(dq_ptr, dq_ptr, rows, DQ_T, DQ_T, left, MAIN, TAIL, HD, False)
        q_end_tail = (tail.to(tl.float32) + dtail.to(tl.float32)).to(q.dtype)
        dq_tail = tl.where((tl.arange(0, 2 * TAIL) < TAIL)[None, :], dtail, q_end_tail)
        A_tail = tl.zeros([M, TAIL], tl.float32)
        D_tail = tl.zeros([M, TAIL], tl.float32)
    m = tl.full([M], -1e30, tl.float32)  # nothing was summed up yet: the first r is 0
    c = tl.zeros([M], tl.float32)
    Z = tl.zeros([M], tl.float32)
    Y = tl.zeros([M], tl.float32)
    for first in range(0, T, N):
        at = tl.cast(first, tl.int64)
        k_at = k_ptr + at * K_T
        dk_at = dk_ptr + at * DK_T
        v_at = v_ptr + at * V_T
        dv_at = dv_ptr + at * DV_T
        dk = _tile(dk_at, keys, DK_T, T - first, 0, MAIN, HD, EVEN)
        k = _tile(k_at, keys, K_T, T - first, 0, MAIN, HD, EVEN)
        dscores = _dot(q_end, tl.trans(dk), tl.zeros([M, N], tl.float32), WIDEN)
        ends = _dot(q_end, tl.trans(k), dscores, WIDEN)
        dscores = _dot(dq, tl.trans(k), dscores, WIDEN)
        if TAIL:
            tails = _tails(k_at, dk_at, keys, K_T, DK_T, T - first, MAIN, TAIL, HD, EVEN)
            ends = _dot(q_end_tail, tl.trans(tails), ends, WIDEN)
            dscores = _dot(dq_tail, tl.trans(tails), dscores, WIDEN)
        if not EVEN:
            ends = tl.where((keys < T - first)[None, :], ends, float("-inf"))
        scores = ends - dscores
        new_m = tl.maximum(m, tl.max(scores, axis=1) * rate)
        new_c = tl.maximum(m + c, tl.max(ends, axis=1) * rate) - new_m
        r = tl.exp2(m - new_m)
        r_end = tl.exp2((m - new_m) + (c - new_c))
        between = _difference(r, r_end, c - new_c, FINE)
        m = new_m
        c = new_c
        scores = scores * rate - m[:, None]
        dscores = dscores * rate - c[:, None]
        w = tl.exp2(scores)
        w_end = tl.exp2(scores + dscores)
        dw = _difference(w, w_end, dscores, FINE)
        Y = r_end * Y + between * Z + tl.sum(dw, axis=1)
        Z = r * Z + tl.sum(w, axis=1)
        w = w.to(q.dtype)
        w_end = w_end.to(q.dtype)
        dw = dw.to(q.dtype)
        D = r_end[:, None] * D + between[:, None] * A
        A = r[:, None] * A
        v = _tile(v_at, keys, V_T, T - first, 0, MAIN, HD, EVEN)
        dv = _tile(dv_at, keys, DV_T, T - first, 0, MAIN, HD, EVEN)
        A, D = _add_values(A, D, w, dw, w_end, v, dv, WIDEN)
        if TAIL:
            v = _tile(v_at, keys, V_T, T - first, MAIN, TAIL, HD, EVEN)
            dv = _tile(dv_at, keys, DV_T, T - first, MAIN, TAIL, HD, EVEN)
            D_tail = r_end[:, None] * D_tail + between[:, None] * A_tail
            A_tail, D_tail = _add_values(r[:, None] * A_tail, D_tail, w, dw, w_end, v, dv, WIDEN)
    _write(out_ptr, rows, H * HD, left, A, D, Z, Y, 0, MAIN, HD)
    if TAIL:
        _write(out_ptr, rows, H * HD, left, A_tail, D_tail, Z, Y, MAIN, TAIL, HD)


def layout(d, element_size):
    """(MAIN, TAIL, M, N, warps, stages, registers) of a head dimension: two powers of two of columns, then the block's
    sizes, and what a thread may take of registers (None: all there are).

    Two accumulators, tiles of scores and the operands of a product must fit the registers. In bfloat16 a warp has 16
    queries to itself: rows are summed up without shared memory, and weights are operands where they are. The limits let
    three programs onto a multiprocessor, two where heads are wide; without them the compiler takes all and spills.
    """
    main = max(16, power_of_two(d + 1) // 2)
    tail = max(8, power_of_two(d - main)) if d > main else 0
    if tail >= main:
        main, tail = 2 * main, 0
    if element_size == 4:
        return main, tail, 32, 16, 8 if main + tail <= 64 else 16, 1, None
    if main + tail > 96:
        return main, tail, 32, 16, 4, 2, None
    return main, tail, 64, 32 if main + tail <= 80 else 16, 4, 3, 168 if main + tail <= 64 else 240


@operation("soflow::attention_increment")
def _attention(q: Tensor, dq: Tensor, k: Tensor, dk: Tensor, v: Tensor, dv: Tensor, scale: float) -> Tensor:
    B, H, T, d = q.shape
    parts = [inner_unit(part) for part in (q, dq, k, dk, v, dv)]
    out = torch.empty(B, T, H, d, dtype=dv.dtype, device=dv.device)
    main, tail, M, N, warps, stages, registers = layout(d, q.element_size())
    blocks = -(-T // M)
    strides = [stride for part in parts for stride in part.stride()[:2]]
    rows = {f"{name}_T": part.stride(2) for name, part in zip(("Q", "DQ", "K", "DK", "V", "DV"), parts, strict=True)}
    unit = 8 if all(stride % 8 == 0 for stride in strides) else 1
    launch(
        _kernel, (B * H * blocks,),
        *parts, out, *(stride // unit for stride in strides), H, T, blocks, scale * math.log2(math.e),
        **rows, HD=d, MAIN=main, TAIL=tail, M=M, N=N, UNIT=unit, EVEN=T % N == 0, FINE=q.dtype == torch.float32,
        WIDEN=INTERPRETED, num_warps=warps, num_stages=stages, maxnreg=registers,
    )  # fmt: skip
    return out.transpose(1, 2)


@_attention.register_fake
def _(q, dq, k, dk, v, dv, scale):
    B, H, T, d = q.shape
    return dv.new_empty(B, T, H, d).transpose(1, 2)


def attention_increment(q: Pair, k: Pair, v: Pair, *, scale: float | None = None) -> Tensor:
    """The increment of attention, of softmax(scale q k') v: [B, H, T, d] in the dtype of v.

    q, k, v: pairs of [B, H, T, d], all six tensors of one dtype, each with its own strides: views of a [B, T, 3, H, d]
    are not copied; scale: None is d^-0.5. bfloat16 and float32 go to the kernel for d up to 128 and a scale above 0;
    float16, whose range increments leave, float64 and larger heads take the reference. The result lies in memory as
    [B, T, H, d], so that `.transpose(1, 2).flatten(2)` copies nothing. No gradient.
    Raises ValueError naming the argument that is wrong or requires a gradient.
    """
    op = "attention_increment"
    q0, dq = check_pair(op, "q", q, ("B", "H", "T", "d"))
    k0, dk = check_pair(op, "k", k, tuple(q0.shape), q0)
    v0, dv = check_pair(op, "v", v, tuple(q0.shape), q0)
    names = ("the increment of q", "the value of k", "the increment of k", "the value of v", "the increment of v")
    for name, part in zip(names, (dq, k0, dk, v0, dv), strict=True):
        if part.dtype != q0.dtype:
            raise ValueError(f"{op}: {name} must be {q0.dtype} like the value of q, got {part.dtype}")
    if 0 in q0.shape:
        return dv.new_empty(dv.shape).transpose(1, 2).contiguous().transpose(1, 2)
    scale = float(q0.shape[-1] ** -0.5 if scale is None else scale)
    fits = q0.dtype != torch.float16 and q0.shape[-1] <= MAX_HEAD_DIM and 0 < scale < math.inf
    if not (fits and use_kernel(q0, dq, k0, dk, v0, dv)):
        return attention_increment_reference(q, k, v, scale)
    return _attention(q0, dq, k0, dk, v0, dv, scale)


def inspect_cases():
    """(label, call): at the shipped shapes, for `python -m soflow_kernels.inspect`."""
    sizes = ((64, 64), (256, 64), (256, 72), (1024, 72), (256, 96))
    for dtype, (T, d) in itertools.product((torch.bfloat16, torch.float32), sizes):
        values, increments = (torch.empty(64, T, 3, 16, d, dtype=dtype).transpose(1, 3) for _ in range(2))
        parts = [part for pair in zip(values.unbind(2), increments.unbind(2), strict=True) for part in pair]
        yield f"attention_increment {T} x {d} {str(dtype)[6:]}", partial(_attention, *parts, d**-0.5)
