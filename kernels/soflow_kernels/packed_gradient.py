"""The gradient of a product that makes q, k and v at once, and of its bias: both from the three that attention gives.

    dqkv = [dq, dk, dv] side by side;  dbias = its sum over all tokens

dq, dk, dv: [B, T, D]; dqkv: [B, T, 3 D]; dbias: [3 D]; bfloat16, float16 or float32, all of one dtype; sums in float32.
Bytes, with S = one pass over [B, T, D]: 6 S, 3 S where the three are views of one tensor as it is to be, which is then
only summed. Put together first and summed then, as autograd and torch do, it is 9 S. At 65 536 x 1152 in bf16 S is
151 MB, 0.05 ms at 2.9 TB/s.

Legend of the kernel: the three as N rows of D columns, NAME_row the stride between rows; `blocks` tiles of COLUMNS
side by side in each of them. A program goes down `rows` rows (its chunk) of one tile of columns of one of the three
(`part`). partial_ptr: [1, 1, chunks, 3 D], what each program adds to dbias.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from soflow_kernels._dispatch import check_tensor, inner_unit, jit, launch, tl, use_kernel
from soflow_kernels._reduce import finish

COLUMNS = 128
ROWS = 16
# Programs of the kernel, which loops over rows: its partial sums are one row of [D] floats for each.
PROGRAMS = 4096


def qkv_gradient_reference(dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
    """`qkv_gradient` in plain PyTorch: any device and dtype."""
    dqkv = torch.cat([dq, dk, dv], -1)
    return dqkv, dqkv.sum((0, 1))


@jit
def _kernel(
    dq_ptr, dk_ptr, dv_ptr, out_ptr, partial_ptr, dq_row, dk_row, dv_row, N, D, blocks, rows,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    chunk = program // (3 * blocks)
    part = (program // blocks) % 3
    cols = (program % blocks) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    ptr = dq_ptr
    row = dq_row
    if part == 1:
        ptr = dk_ptr
        row = dk_row
    if part == 2:
        ptr = dv_ptr
        row = dv_row
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    last = tl.minimum((chunk + 1) * rows, N)
    for start in tl.range(chunk * rows, last, ROWS, num_stages=2):
        at = start + tl.arange(0, ROWS)[:, None]
        mask = (at < last) & (cols < D)
        values = tl.load(ptr + at * row + cols, mask=mask, other=0.0)
        total += values.to(tl.float32)
        tl.store(out_ptr + at * (3 * D) + part * D + cols, values, mask=mask)
    tl.store(partial_ptr + (chunk * 3 + part) * D + cols, tl.sum(total, axis=0)[None, :], mask=cols < D)


@torch.library.custom_op("soflow::qkv_gradient", mutates_args=())
def _qkv_gradient(dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
    B, T, D = dq.shape
    parts = [inner_unit(part.reshape(-1, D)) for part in (dq, dk, dv)]
    out = torch.empty(B, T, 3 * D, dtype=dq.dtype, device=dq.device)
    N, blocks = B * T, -(-D // COLUMNS)
    rows = ROWS * max(4, -(-N * 3 * blocks // (ROWS * PROGRAMS)))
    chunks = -(-N // rows)
    partials = torch.empty(1, 1, chunks, 3 * D, dtype=torch.float32, device=dq.device)
    launch(
        _kernel, (chunks * 3 * blocks,),
        *parts, out, partials, *(part.stride(0) for part in parts), N, D, blocks, rows,
        ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
    return out, finish(partials, [dq.dtype])[0].view(3 * D)


@_qkv_gradient.register_fake
def _(dq, dk, dv):
    B, T, D = dq.shape
    return dq.new_empty(B, T, 3 * D), dq.new_empty(3 * D)


def _together(dq: Tensor, dk: Tensor, dv: Tensor) -> Tensor | None:
    """The tensor [B, T, 3 D] of which the three are the thirds, None if they are not."""
    B, T, D = dq.shape
    strides = (3 * T * D, 3 * D, 1)
    first = dq.storage_offset()
    for k, part in enumerate((dq, dk, dv)):
        of_one = part.untyped_storage()._cdata == dq.untyped_storage()._cdata
        if not of_one or part.stride() != strides or part.storage_offset() != first + k * D:
            return None
    return dq.as_strided((B, T, 3 * D), strides)


def qkv_gradient(dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
    """(dqkv [B, T, 3 D], dbias [3 D]) from dq, dk and dv [B, T, D], for a backward of one's own.

    bfloat16, float16, float32 or float64 (which takes the reference), all of one dtype; any strides. Where the three
    are thirds of one tensor, as the backward of some attention packages leaves them, dqkv is that tensor. Not
    differentiable.
    Raises ValueError naming the argument whose type, shape, dtype or device is wrong.
    """
    op = "qkv_gradient"
    check_tensor(op, "dq", dq, ("B", "T", "D"))
    for name, value in (("dk", dk), ("dv", dv)):
        check_tensor(op, name, value, tuple(dq.shape), dq)
        if value.dtype != dq.dtype:
            raise ValueError(f"{op}: {name} must be {dq.dtype} like dq, got {value.dtype}")
    if not use_kernel(dq, dk, dv) or not dq.numel():
        return qkv_gradient_reference(dq, dk, dv)
    whole = _together(dq, dk, dv)
    return _qkv_gradient(dq, dk, dv) if whole is None else (whole, whole.sum((0, 1)))


def inspect_cases() -> Iterator[tuple[str, Callable]]:
    """(label, call): at the shipped shapes, for `python -m soflow_kernels.inspect`."""
    for dtype, D in itertools.product((torch.bfloat16, torch.float32), (768, 1024, 1152)):
        x = torch.empty(256, 256, D, dtype=dtype)
        yield f"qkv_gradient {D} {str(dtype)[6:]}", partial(_qkv_gradient, x, x, x)
