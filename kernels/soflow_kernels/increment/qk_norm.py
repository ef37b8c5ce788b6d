"""The increments of RMSNorm of queries and keys over the head dimension (see the package), in float32: with the size
a = sqrt(mean(h^2) + eps) of a row, and a' at its end,

    d = w (dh / a' - h (a'^2 - a^2) / (a a' (a + a'))),   a'^2 - a^2 = mean(dh (2 h + dh))

A row that shrinks to less than half of its size has d = w ((h + dh) / a' - h / a) instead: there nothing cancels in
this difference, and the terms above, divided by a small a', do.

q, dq, k, dk: [B, H, T, d] or [B, T, H, d], any strides; weights: [d]; bfloat16, float16 or float32, each of its own.
Bytes, with S = one pass over q: 6 S, as only the increments are written. The kernel is laid out as
`soflow_kernels.qk_norm`.
"""

import itertools
from functools import partial

import torch
from torch import Tensor

from soflow_kernels._dispatch import check_dtype, check_quiet, jit, launch, operation, tl, use_kernel
from soflow_kernels.increment._pair import Pair, check_pair, wide
from soflow_kernels.qk_norm import heads_inside, in_order, like, place, rms, rows_of, strides, takes_rows, widths

TILE = 1024


def rms_norm_increment(h: Tensor, dh: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """The increment of RMSNorm over the last dimension."""
    start = (h.square().mean(-1, keepdim=True) + eps).sqrt()
    end = ((h + dh).square().mean(-1, keepdim=True) + eps).sqrt()
    growth = (dh * (2 * h + dh)).mean(-1, keepdim=True)
    near = dh / end - h * (growth / (start * end * (start + end)))
    return torch.where(end < 0.5 * start, (h + dh) / end - h / start, near) * weight


def qk_rms_norm_increment_reference(
    q: Pair, k: Pair, q_weight: Tensor, k_weight: Tensor, eps: float = 1e-6, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """`qk_rms_norm_increment` in plain PyTorch: any device and dtype."""
    outs = []
    for (h, dh), weight in ((q, q_weight), (k, k_weight)):
        value, increment = wide(h), wide(dh)
        outs.append(rms_norm_increment(value, increment, weight.to(value.dtype), eps).to(dtype or dh.dtype))
    return outs[0], outs[1]


@jit
def _increment(h, dh, weight, eps, D: tl.constexpr):
    start = rms(h, eps, D)
    # Not from the start and its growth: for an end near 0 they would cancel.
    end = rms(h + dh, eps, D)
    growth = (tl.sum(dh * (2 * h + dh), axis=1) / D)[:, None]
    near = dh / end - h * (growth / (start * end * (start + end)))
    return tl.where(end < 0.5 * start, (h + dh) / end - h / start, near) * weight


@jit
def _kernel(
    q_ptr, dq_ptr, k_ptr, dk_ptr, q_weight_ptr, k_weight_ptr, q_out_ptr, k_out_ptr,
    q_b, q_i, q_j, dq_b, dq_i, dq_j, k_b, k_i, k_j, dk_b, dk_i, dk_j, N, M, L, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, WIDTH)
    mask = (n < N)[:, None] & (cols < D)[None, :]
    q = rows_of(q_ptr, place(n, q_b, q_i, q_j, M, L, UNIT), cols, mask)
    dq = rows_of(dq_ptr, place(n, dq_b, dq_i, dq_j, M, L, UNIT), cols, mask)
    k = rows_of(k_ptr, place(n, k_b, k_i, k_j, M, L, UNIT), cols, mask)
    dk = rows_of(dk_ptr, place(n, dk_b, dk_i, dk_j, M, L, UNIT), cols, mask)
    q_weight = tl.load(q_weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    k_weight = tl.load(k_weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    out = n.to(tl.int64)[:, None] * D + cols[None, :]
    tl.store(q_out_ptr + out, _increment(q, dq, q_weight, eps, D), mask=mask)
    tl.store(k_out_ptr + out, _increment(k, dk, k_weight, eps, D), mask=mask)


@operation("soflow::qk_rms_norm_increment")
def _qk_rms_norm(
    q: Tensor, dq: Tensor, k: Tensor, dk: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float,
    q_dtype: torch.dtype, k_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    outs = like(q, q, q_dtype), like(q, k, k_dtype)
    swap = heads_inside(q)
    given = in_order(swap, q, dq, k, dk)
    B, M, L, d = given[0].shape
    width, rows = widths(d, TILE)
    steps, unit = strides(*given)
    launch(
        _kernel, (-(-B * M * L // rows),),
        *given, q_weight.contiguous(), k_weight.contiguous(), *in_order(swap, *outs), *steps,
        B * M * L, M, L, float(eps), D=d, WIDTH=width, ROWS=rows, UNIT=unit, num_warps=4,
    )  # fmt: skip
    return outs


@_qk_rms_norm.register_fake
def _(q, dq, k, dk, q_weight, k_weight, eps, q_dtype, k_dtype):
    return like(q, q, q_dtype), like(q, k, k_dtype)


def qk_rms_norm_increment(
    q: Pair, k: Pair, q_weight: Tensor, k_weight: Tensor, *, eps: float = 1e-6, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The increments of RMSNorm of q and of k over their last dimension, in `dtype` (None: those of the increments).

    q, k: pairs of [B, H, T, d] or [B, T, H, d], of one shape and any strides; q_weight, k_weight: [d]. bfloat16,
    float16, float32 or float64 (which takes the reference, as d above 1024 does); no gradient. The results are dense,
    in the order of dimensions in which the value of q lies in memory.
    Raises ValueError naming the argument that is wrong or requires a gradient.
    """
    op = "qk_rms_norm_increment"
    q0, dq = check_pair(op, "q", q, ("B", "H", "T", "d"))
    k0, dk = check_pair(op, "k", k, tuple(q0.shape), q0)
    check_quiet(op, "q_weight", q_weight, (q0.shape[-1],), q0)
    check_quiet(op, "k_weight", k_weight, (q0.shape[-1],), q0)
    check_dtype(op, "dtype", dtype)
    if not (use_kernel(q0, dq, k0, dk, q_weight, k_weight) and takes_rows(q0)):
        return qk_rms_norm_increment_reference(q, k, q_weight, k_weight, eps, dtype)
    return _qk_rms_norm(q0, dq, k0, dk, q_weight, k_weight, eps, dtype or dq.dtype, dtype or dk.dtype)


def inspect_cases():
    """(label, call): at the shipped shapes, for `python -m soflow_kernels.inspect`. "mixed": the weights in float32."""
    half, single = torch.bfloat16, torch.float32
    for (kind, low, weights), d in itertools.product(
        (("bfloat16", half, half), ("float32", single, single), ("mixed", half, single)), (64, 72, 96, 128)
    ):
        (q, k, _), (dq, dk, _) = (torch.empty(64, 256, 3, 16, d, dtype=low).unbind(2) for _ in range(2))
        weight = torch.empty(d, dtype=weights)
        yield (
            f"qk_rms_norm_increment {d} {kind}",
            partial(_qk_rms_norm, q, dq, k, dk, weight, weight, 1e-6, low, low),
        )
