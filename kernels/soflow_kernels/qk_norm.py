"""RMSNorm of the queries and of the keys of attention over the head dimension, both in one launch:

    q' = q rstd(q) q_weight,   k' = k rstd(k) k_weight,   rstd(x) = 1 / sqrt(mean(x^2) + eps)

q, k: [B, H, T, d] or [B, T, H, d], any strides; weights: [d]; bfloat16, float16 or float32, dtypes may differ, float32
inside, rounded once, as by torch's rms_norm. Backward, with n = x rstd and dx' the gradient of x':

    dx = rstd (w dx' - n mean(w dx' n)),   dw = the sum of dx' n over all rows, by partial sums

Kept for the backward: q, k and the weights; rstd is made again. Bytes, with S = one pass over q: forward 4 S, backward
6 S. At 65 536 x 1152 in bf16 S is 151 MB: 0.14 and 0.21 ms at 4.3 TB/s. With it no logit of attention is larger than
sqrt(d) times the largest |q_weight k_weight|, whatever the weights before it (Henry et al. 2020, arXiv 2010.04245;
Dehghani et al. 2023, arXiv 2302.05442; with RMSNorm, as in LightningDiT, arXiv 2501.01423).

Legend of the kernels: N rows of D numbers, row n of sample b, at (i, j) of its M x L rows, addressed by the strides
NAME_b, NAME_i, NAME_j in UNITs of numbers, so that the compiler sees what they are multiples of (a head of 72 is no
multiple of 16); what is written is contiguous. A program of the forward takes ROWS rows of both tensors; one of
the backward `rows` of them (its chunk), ROWS at a time. D columns are WIDTH wide. partial_ptr: [2, 1, chunks,
WIDTH], what each chunk adds to the gradients of the weights, 0 past D.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from soflow_kernels._dispatch import check_tensor, inner_unit, jit, launch, operation, tl, use_kernel
from soflow_kernels._reduce import finish, split_rows
from soflow_kernels._rows import power_of_two

MAX_HEAD_DIM = 1024
MAX_ROWS = 2**30
"""Rows are numbered in 32 bits, addresses in 64; of a head of 16 numbers more are 34 GB in bf16."""
# With 4 warps a thread has 16 numbers of each tensor, two 16-byte loads in bf16; of the backward, which holds four
# tensors and two sums, 8.
TILE = 2048
BACKWARD_TILE = 1024
# Rows that a program of the backward has at least.
LEAST_ROWS = 64


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSNorm of x [..., d] with weight [d], in the dtype of x: any device and dtype, any order of differentiation."""
    h = x if x.dtype == torch.float64 else x.float()
    out = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * weight.to(h.dtype)
    return out if out.dtype == x.dtype else out.to(x.dtype)


def qk_rms_norm_reference(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """`qk_rms_norm` in plain PyTorch: any device and dtype, any order of differentiation."""
    return rms_norm_reference(q, q_weight, eps), rms_norm_reference(k, k_weight, eps)


@jit
def place(n, b_stride, i_stride, j_stride, M, L, UNIT: tl.constexpr):
    """Where rows n begin."""
    j = n % L
    i = (n // L) % M
    b = n // (L * M)
    return (b.to(tl.int64) * b_stride + i.to(tl.int64) * i_stride + j.to(tl.int64) * j_stride) * UNIT


@jit
def rows_of(ptr, at, cols, mask):
    """Rows [ROWS, WIDTH] in float32, 0 outside."""
    return tl.load(ptr + at[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@jit
def rms(x, eps, D: tl.constexpr):
    """sqrt(mean(x^2) + eps) of rows, [ROWS, 1]."""
    return tl.sqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]


@jit
def _forward_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, q_out_ptr, k_out_ptr, q_b, q_i, q_j, k_b, k_i, k_j, N, M, L, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, WIDTH)
    mask = (n < N)[:, None] & (cols < D)[None, :]
    q = rows_of(q_ptr, place(n, q_b, q_i, q_j, M, L, UNIT), cols, mask)
    k = rows_of(k_ptr, place(n, k_b, k_i, k_j, M, L, UNIT), cols, mask)
    q_weight = tl.load(q_weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    k_weight = tl.load(k_weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    out = n.to(tl.int64)[:, None] * D + cols[None, :]
    tl.store(q_out_ptr + out, q / rms(q, eps, D) * q_weight, mask=mask)
    tl.store(k_out_ptr + out, k / rms(k, eps, D) * k_weight, mask=mask)


@jit
def _gradient(dout_ptr, dout_at, x_ptr, x_at, dx_ptr, out, weight, cols, mask, eps, D: tl.constexpr):
    """Writes dx of some rows; returns what they add to dw, [ROWS, WIDTH]."""
    x = rows_of(x_ptr, x_at, cols, mask)
    dout = rows_of(dout_ptr, dout_at, cols, mask)
    size = rms(x, eps, D)
    x = x / size
    dx = dout * weight
    dx = (dx - x * (tl.sum(dx * x, axis=1) / D)[:, None]) / size
    tl.store(dx_ptr + out, dx, mask=mask)
    return tl.where(mask, dout * x, 0.0)


@jit
def _backward_kernel(
    dq_out_ptr, dk_out_ptr, q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, dq_ptr, dk_ptr, partial_ptr,
    dq_out_b, dq_out_i, dq_out_j, dk_out_b, dk_out_i, dk_out_j, q_b, q_i, q_j, k_b, k_i, k_j,
    N, M, L, rows, eps, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    cols = tl.arange(0, WIDTH)
    q_weight = tl.load(q_weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    k_weight = tl.load(k_weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    q_sum = tl.zeros([ROWS, WIDTH], tl.float32)
    k_sum = tl.zeros([ROWS, WIDTH], tl.float32)
    last = tl.minimum((chunk + 1) * rows, N)
    for start in tl.range(chunk * rows, last, ROWS):
        n = start + tl.arange(0, ROWS)
        mask = (n < last)[:, None] & (cols < D)[None, :]
        out = n.to(tl.int64)[:, None] * D + cols[None, :]
        q_sum += _gradient(
            dq_out_ptr, place(n, dq_out_b, dq_out_i, dq_out_j, M, L, UNIT), q_ptr, place(n, q_b, q_i, q_j, M, L, UNIT),
            dq_ptr, out, q_weight, cols, mask, eps, D,
        )  # fmt: skip
        k_sum += _gradient(
            dk_out_ptr, place(n, dk_out_b, dk_out_i, dk_out_j, M, L, UNIT), k_ptr, place(n, k_b, k_i, k_j, M, L, UNIT),
            dk_ptr, out, k_weight, cols, mask, eps, D,
        )  # fmt: skip
    at = partial_ptr + chunk.to(tl.int64) * WIDTH + cols
    tl.store(at, tl.sum(q_sum, axis=0))
    tl.store(at + tl.num_programs(0).to(tl.int64) * WIDTH, tl.sum(k_sum, axis=0))


def heads_inside(q: Tensor) -> bool:
    """Whether the second of the two middle dimensions of q varies slower in memory than the first: as in [B, H, T, d],
    a view of [B, T, H, d]. Results lie in memory as q does."""
    return q.stride(1) < q.stride(2)


def in_order(swap: bool, *tensors: Tensor) -> list[Tensor]:
    """Tensors with their rows in the order of memory, and d contiguous."""
    return [inner_unit(tensor.transpose(1, 2) if swap else tensor) for tensor in tensors]


def like(q: Tensor, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A new tensor of the shape of q, that lies in memory as q does, on the device and in the dtype of another."""
    B, M, L, d = q.shape
    if heads_inside(q):
        return tensor.new_empty(B, L, M, d, dtype=dtype).transpose(1, 2)
    return tensor.new_empty(B, M, L, d, dtype=dtype)


def strides(*tensors: Tensor) -> tuple[list[int], int]:
    """The strides over rows of all tensors, in units of so many numbers as is returned."""
    found = [stride for tensor in tensors for stride in tensor.stride()[:3]]
    unit = 8 if all(stride % 8 == 0 for stride in found) else 1
    return [stride // unit for stride in found], unit


def widths(d: int, tile: int) -> tuple[int, int]:
    """(WIDTH, ROWS) of tiles."""
    width = power_of_two(d)
    return width, min(max(tile // width, 1), 256)


@operation("soflow::qk_rms_norm")
def _qk_rms_norm(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    outs = like(q, q), like(q, k)
    swap = heads_inside(q)
    q, k = in_order(swap, q, k)
    q_out, k_out = in_order(swap, *outs)
    B, M, L, d = q.shape
    width, rows = widths(d, TILE)
    steps, unit = strides(q, k)
    launch(
        _forward_kernel, (-(-B * M * L // rows),),
        q, k, q_weight.contiguous(), k_weight.contiguous(), q_out, k_out, *steps, B * M * L, M, L, float(eps),
        D=d, WIDTH=width, ROWS=rows, UNIT=unit, num_warps=4,
    )  # fmt: skip
    return outs


@_qk_rms_norm.register_fake
def _(q, k, q_weight, k_weight, eps):
    return like(q, q), like(q, k)


@operation("soflow::qk_rms_norm_backward")
def _qk_rms_norm_backward(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk = like(q, q), like(q, k)
    swap = heads_inside(q)
    given = in_order(swap, dq_out, dk_out, q, k)
    B, M, L, d = given[2].shape
    width, rows = widths(d, BACKWARD_TILE)
    chunks, per_chunk = split_rows(1, B * M * L, LEAST_ROWS)
    steps, unit = strides(*given)
    partials = torch.empty(2, 1, chunks, width, dtype=torch.float32, device=q.device)
    launch(
        _backward_kernel, (chunks,),
        *given, q_weight.contiguous(), k_weight.contiguous(), *in_order(swap, dq, dk), partials, *steps,
        B * M * L, M, L, per_chunk, float(eps), D=d, WIDTH=width, ROWS=rows, UNIT=unit, num_warps=4,
    )  # fmt: skip
    dq_weight, dk_weight = (dw[0, :d] for dw in finish(partials, [q_weight.dtype, k_weight.dtype]))
    return dq, dk, dq_weight, dk_weight


@_qk_rms_norm_backward.register_fake
def _(dq_out, dk_out, q, k, q_weight, k_weight, eps):
    return like(q, q), like(q, k), q_weight.new_empty(q_weight.shape), k_weight.new_empty(k_weight.shape)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _grad(ctx: Any, dq_out: Tensor, dk_out: Tensor) -> tuple[Tensor | None, ...]:
    return *_qk_rms_norm_backward(dq_out, dk_out, *ctx.saved_tensors, ctx.eps), None


_qk_rms_norm.register_autograd(_grad, setup_context=_save)


def takes_rows(q: Tensor) -> bool:
    """Whether the kernels take tensors of the shape of q [., ., ., d]."""
    return 0 < q.shape[-1] <= MAX_HEAD_DIM and q.shape[0] * q.shape[1] * q.shape[2] <= MAX_ROWS


def qk_rms_norm(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """RMSNorm of q and of k over their last dimension, each with a weight of its own (arXiv 2010.04245, 1910.07467).

    q, k: [B, H, T, d] or [B, T, H, d], of one shape and any strides; q_weight, k_weight: [d]. bfloat16, float16,
    float32 or float64 (which takes the reference, as d above 1024 does). Returns (q', k') of the dtypes of q and k,
    dense, in the order of dimensions in which q lies in memory. Differentiable in all four.
    Raises ValueError naming the argument whose type, shape, dtype or device is wrong.
    """
    op = "qk_rms_norm"
    check_tensor(op, "q", q, ("B", "H", "T", "d"))
    check_tensor(op, "k", k, tuple(q.shape), q)
    check_tensor(op, "q_weight", q_weight, (q.shape[-1],), q)
    check_tensor(op, "k_weight", k_weight, (q.shape[-1],), q)
    if not (use_kernel(q, k, q_weight, k_weight) and takes_rows(q)):
        return qk_rms_norm_reference(q, k, q_weight, k_weight, eps)
    return _qk_rms_norm(q, k, q_weight, k_weight, eps)


def inspect_cases() -> Iterator[tuple[str, Callable]]:
    """(label, call): forward and backward at the shipped shapes, for `python -m soflow_kernels.inspect`. "mixed": the
    weights in float32."""
    half, single = torch.bfloat16, torch.float32
    for (kind, low, weights), d in itertools.product(
        (("bfloat16", half, half), ("float32", single, single), ("mixed", half, single)), (64, 72, 96, 128)
    ):
        q, k, _ = torch.empty(256, 256, 3, 16, d, dtype=low).unbind(2)  # as a product leaves them
        weight, dense = torch.empty(d, dtype=weights), torch.empty(256, 256, 16, d, dtype=low)
        yield f"qk_rms_norm {d} {kind}", partial(_qk_rms_norm, q, k, weight, weight, 1e-6)
        yield (
            f"qk_rms_norm backward {d} {kind}",
            partial(_qk_rms_norm_backward, dense, dense, q, k, weight, weight, 1e-6),
        )
