"""Sums over tokens in two steps: programs keep float32 partial sums [K, B, N, D], one small launch adds the N of each.

No atomics: the order of every addition is fixed by the shapes alone, so the same input gives the same bits every time.

Legend: K sums at once, one plane [B, N, D] of partials each; B samples, N partial sums of each, D columns. A program of
the finishing kernel makes COLUMNS columns of one sample in every plane, ROWS partial sums at a time.
"""

import torch
from torch import Tensor

from soflow_kernels._dispatch import jit, launch, tl
from soflow_kernels._rows import power_of_two

# Programs of a kernel that loops over tokens: enough to fill the largest GPU, few enough that partial sums stay small
# beside the activations (1024 x 3 x 1152 floats are 14 MB; one bf16 pass over 65 536 x 1152 activations is 151 MB).
PROGRAMS = 1024
COLUMNS = 32
ROWS = 64


def split_rows(groups: int, rows: int, least: int) -> tuple[int, int]:
    """(chunks, rows per chunk) for `groups` samples of `rows` tokens; a chunk has at least `least` tokens if it can."""
    chunks = max(1, min(-(-rows // least), PROGRAMS // max(groups, 1)))
    per_chunk = max(1, -(-rows // chunks))
    return -(-rows // per_chunk), per_chunk


@jit
def _column_sum(partial_ptr, b, k, B, N, D, cols, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    base = partial_ptr + (k * B + b) * N * D
    for first in range(0, N, ROWS):
        rows = first + tl.arange(0, ROWS)
        mask = (rows < N)[:, None] & (cols < D)[None, :]
        total += tl.load(base + rows.to(tl.int64)[:, None] * D + cols[None, :], mask=mask, other=0.0)
    return tl.sum(total, axis=0)


@jit
def _finish_kernel(
    partial_ptr, out0_ptr, out1_ptr, out2_ptr, out3_ptr, B, N, D, blocks,
    K: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    b = program // blocks
    cols = (program % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    at = b * D + cols
    tl.store(out0_ptr + at, _column_sum(partial_ptr, b, 0, B, N, D, cols, COLUMNS, ROWS), mask=cols < D)
    if K > 1:
        tl.store(out1_ptr + at, _column_sum(partial_ptr, b, 1, B, N, D, cols, COLUMNS, ROWS), mask=cols < D)
    if K > 2:
        tl.store(out2_ptr + at, _column_sum(partial_ptr, b, 2, B, N, D, cols, COLUMNS, ROWS), mask=cols < D)
    if K > 3:
        tl.store(out3_ptr + at, _column_sum(partial_ptr, b, 3, B, N, D, cols, COLUMNS, ROWS), mask=cols < D)


def finish(partials: Tensor, dtypes: list[torch.dtype], most: int = ROWS) -> list[Tensor]:
    """Partial sums [K, B, N, D] float32 -> K tensors [B, D] of `dtypes`, summed over N in order. K is at most 4. most:
    partial sums that a program takes at a time, a power of two."""
    K, B, N, D = partials.shape
    outs = [torch.empty(B, D, dtype=dtype, device=partials.device) for dtype in dtypes]
    blocks = -(-D // COLUMNS)
    padded = outs + [outs[0]] * (4 - K)  # pointers that the kernel does not touch
    # A power of two no larger than needed: with 4 chunks, 64 rows would be mostly masked.
    rows = min(most, power_of_two(N))
    launch(
        _finish_kernel, (B * blocks,), partials, *padded, B, N, D, blocks, K=K, COLUMNS=COLUMNS, ROWS=rows, num_warps=4
    )
    return outs
