"""The gradient of a product that makes q, k and v at once, and of its bias: both from the three that attention gives.

    dqkv = [dq, dk, dv] side by side;  dbias = its sum over all tokens

dq, dk, dv: [B, T, D]; dqkv: [B, T, 3 D]; dbias: [3 D]; bfloat16, float16 or float32, all of one dtype; sums in float32.
Bytes, with S = one pass over [B, T, D]: 6 S, 3 S where the three are views of one tensor as it is to be, which is then
only summed. Put together first and summed then, as autograd and torch do, it is 9 S. At 65 536 x 1152 in bf16 S is
151 MB, 0.05 ms at 2.9 TB/s.

Legend of the kernel: the three as N rows of D columns, NAME_row the stride between rows; `blocks` tiles of COLUMNS
side by side in each of them. A program goes down `rows` rows (its chunk) of one tile of columns of one of the three
(`part`, of PARTS). partial_ptr: [1, 1, chunks, PARTS D], what each program adds to dbias. PARTS 1: the sum alone of one
tensor, dq; nothing is written to out_ptr, which is None.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from soflow_kernels._dispatch import check_tensor, inner_unit, jit, launch, operation, tl, use_kernel
from soflow_kernels._reduce import finish

COLUMNS = 128
ROWS = 16
# Programs of the kernel, which loops over rows: its partial sums are one row of [D] floats for each.
PROGRAMS = 4096


def qkv_gradient_reference(dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
    """`qkv_gradient` in plain PyTorch: any device and dtype."""
    dqkv = torch.cat([dq, dk, dv], -1)
    return dqkv, dqkv.sum((0, 1))


def token_sum_reference(x: Tensor) -> Tensor:
    """`token_sum` in plain PyTorch: any device and dtype."""
    return torch.atleast_2d(x).flatten(0, -2).sum(0)


@jit
def _kernel(
    dq_ptr, dk_ptr, dv_ptr, out_ptr, partial_ptr, dq_row, dk_row, dv_row, N, D, blocks, rows,
    PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    chunk = program // (PARTS * blocks)
    part = (program // blocks) % PARTS
    cols = (program % blocks) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    ptr = dq_ptr
    row = dq_row
    if PARTS > 1:
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
        if PARTS > 1:
            tl.store(out_ptr + at * (PARTS * D) + part * D + cols, values, mask=mask)
    tl.store(partial_ptr + (chunk * PARTS + part) * D + cols, tl.sum(total, axis=0)[None, :], mask=cols < D)


def _launch(parts: list[Tensor], out: Tensor | None) -> Tensor:
    """The sums of one or three [N, D] over N, side by side; the three are also written side by side to `out`."""
    dq, dk, dv = parts if len(parts) == 3 else parts * 3
    N, D = dq.shape
    blocks = -(-D // COLUMNS)
    columns = len(parts) * D
    rows = ROWS * max(4, -(-N * len(parts) * blocks // (ROWS * PROGRAMS)))
    chunks = -(-N // rows)
    partials = torch.empty(1, 1, chunks, columns, dtype=torch.float32, device=dq.device)
    launch(
        _kernel, (chunks * len(parts) * blocks,),
        dq, dk, dv, out, partials, dq.stride(0), dk.stride(0), dv.stride(0), N, D, blocks, rows,
        PARTS=len(parts), ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
    return finish(partials, [dq.dtype])[0].view(columns)


@operation("soflow::qkv_gradient")
def _qkv_gradient(dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
    B, T, D = dq.shape
    out = torch.empty(B, T, 3 * D, dtype=dq.dtype, device=dq.device)
    return out, _launch([inner_unit(part.reshape(-1, D)) for part in (dq, dk, dv)], out)


@_qkv_gradient.register_fake
def _(dq, dk, dv):
    B, T, D = dq.shape
    return dq.new_empty(B, T, 3 * D), dq.new_empty(3 * D)


@operation("soflow::token_sum")
def _token_sum(x: Tensor) -> Tensor:
    return _launch([inner_unit(x.reshape(-1, x.shape[-1]))], None)


@_token_sum.register_fake
def _(x):
    return x.new_empty(x.shape[-1])


def _together(dq: Tensor, dk: Tensor, dv: Tensor) -> Tensor | None:
    """The tensor [B, T, 3 D] of which the three are the thirds; None if they are not, or while torch.compile traces,
    which cannot follow the question."""
    if torch.compiler.is_compiling():
        return None
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
    return _qkv_gradient(dq, dk, dv) if whole is None else (whole, _token_sum(whole))


def token_sum(x: Tensor) -> Tensor:
    """The sum of x [..., D] over all but the last dimension, [D], in the dtype of x: the gradient of a bias.

    bfloat16, float16, float32 or float64 (which takes torch's own); any strides. Not differentiable. Raises ValueError
    naming the argument whose type, shape, dtype or device is wrong.
    """
    check_tensor("token_sum", "x", x, (..., "D"))
    if not use_kernel(x) or not x.numel():
        return token_sum_reference(x)
    return _token_sum(x)


def inspect_cases() -> Iterator[tuple[str, Callable]]:
    """(label, call): at the shipped shapes, for `python -m soflow_kernels.inspect`."""
    for dtype, D in itertools.product((torch.bfloat16, torch.float32), (768, 1024, 1152)):
        x = torch.empty(256, 256, D, dtype=dtype)
        yield f"qkv_gradient {D} {str(dtype)[6:]}", partial(_qkv_gradient, x, x, x)
        whole = torch.empty(256, 256, 3 * D, dtype=dtype)
        yield f"token_sum {3 * D} {str(dtype)[6:]}", partial(_token_sum, whole)
