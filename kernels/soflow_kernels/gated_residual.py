"""The gated residual sum of adaLN-Zero alone, x' = x + gate (y + bias) (arXiv 2212.09748, section 3.2).

It ends a block where no norm follows at once; `adaln` has the sum with the norm after it. x, y, x': [B, T, D]; gate:
[B, D]; bias: [D] or None. bfloat16, float16 or float32, dtypes may differ, float32 inside. Backward, with dx' the
gradient of x':

    dx = dx'     dy = gate dx'     dgate = sum_t dx' (y + bias)     dbias = sum_bt dy

Bytes, with S = one pass over [B, T, D]: forward 3 S, backward 3 S. At 65 536 x 1152 in bf16 S is 151 MB: 0.11 ms each
at 4.3 TB/s.

Legend of the kernels: no sum over D is needed, so a program takes COLUMNS of them and goes over the `rows` tokens of
one part (of `chunks`) of sample b, ROWS tokens t at a time; `blocks` programs side by side cover D. NAME_b, NAME_t:
strides over samples and tokens. partial_ptr: [1 or 2 planes (dgate, dbias), B, chunks, D], summed over the chunks by
`_reduce.finish`. bias_ptr None: there is no bias.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from soflow_kernels._dispatch import check_tensor, inner_unit, jit, launch, operation, tl, use_kernel
from soflow_kernels._reduce import finish, split_rows

# A program works on tiles of 128 columns, a divisor of every usual width, and 16 tokens: with 4 warps a thread has
# 16 values, two 16-byte loads in bf16.
COLUMNS = 128
ROWS = 16


def gate_residual_reference(x: Tensor, y: Tensor, gate: Tensor, bias: Tensor | None = None) -> Tensor:
    """`gate_residual` in plain PyTorch: any device and dtype, any order of differentiation."""
    y = y if bias is None else y + bias
    total = torch.addcmul(x, gate.unsqueeze(1), y)
    return total if total.dtype == x.dtype else total.to(x.dtype)


@jit
def _forward_kernel(
    x_ptr, y_ptr, gate_ptr, bias_ptr, out_ptr, x_b, x_t, y_b, y_t, gate_b, T, chunks, rows, blocks,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    cols = (program % blocks) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    chunk = program // blocks
    b = chunk // chunks
    first = (chunk % chunks) * rows
    gate = tl.load(gate_ptr + b * gate_b + cols, mask=cols < D, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    last = tl.minimum(first + rows, T)
    for start in tl.range(first, last, ROWS, num_stages=2):
        t = start + tl.arange(0, ROWS)[:, None]
        mask = (t < last) & (cols < D)
        x = tl.load(x_ptr + b * x_b + t * x_t + cols, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + b * y_b + t * y_t + cols, mask=mask, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            y += bias
        tl.store(out_ptr + (b * T + t) * D + cols, x + gate * y, mask=mask)


@jit
def _backward_kernel(
    dout_ptr, y_ptr, gate_ptr, bias_ptr, dy_ptr, partial_ptr,
    dout_b, dout_t, y_b, y_t, gate_b, T, chunks, rows, blocks,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    cols = (program % blocks) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    chunk = program // blocks
    b = chunk // chunks
    first = (chunk % chunks) * rows
    gate = tl.load(gate_ptr + b * gate_b + cols, mask=cols < D, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    dgate = tl.zeros([ROWS, COLUMNS], tl.float32)
    dbias = tl.zeros([ROWS, COLUMNS], tl.float32)
    last = tl.minimum(first + rows, T)
    for start in tl.range(first, last, ROWS, num_stages=2):
        t = start + tl.arange(0, ROWS)[:, None]
        mask = (t < last) & (cols < D)
        dout = tl.load(dout_ptr + b * dout_b + t * dout_t + cols, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + b * y_b + t * y_t + cols, mask=mask, other=0.0).to(tl.float32)
        dy = dout * gate
        if bias_ptr is not None:
            y += bias
            dbias += dy
        dgate += dout * y
        tl.store(dy_ptr + (b * T + t) * D + cols, dy, mask=mask)
    at = partial_ptr + chunk * D + cols
    tl.store(at, tl.sum(dgate, axis=0)[None, :], mask=cols < D)
    if bias_ptr is not None:
        plane = (tl.num_programs(0) // blocks).to(tl.int64) * D
        tl.store(at + plane, tl.sum(dbias, axis=0)[None, :], mask=cols < D)


@operation("soflow::gate_residual")
def _gate_residual(x: Tensor, y: Tensor, gate: Tensor, bias: Tensor | None) -> Tensor:
    B, T, D = x.shape
    x, y, gate = inner_unit(x), inner_unit(y), inner_unit(gate)
    out = torch.empty(B, T, D, dtype=x.dtype, device=x.device)
    blocks = -(-D // COLUMNS)
    rows = 4 * ROWS
    chunks = -(-T // rows)
    launch(
        _forward_kernel, (B * chunks * blocks,),
        x, y, gate, None if bias is None else bias.contiguous(), out,
        x.stride(0), x.stride(1), y.stride(0), y.stride(1), gate.stride(0), T, chunks, rows, blocks,
        D=D, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
    return out


@_gate_residual.register_fake
def _(x, y, gate, bias):
    return x.new_empty(x.shape)


@operation("soflow::gate_residual_backward")
def _gate_residual_backward(
    dout: Tensor, y: Tensor, gate: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, D = y.shape
    dout, y, gate = inner_unit(dout), inner_unit(y), inner_unit(gate)
    dy = torch.empty(B, T, D, dtype=y.dtype, device=y.device)
    blocks = -(-D // COLUMNS)
    chunks, rows = split_rows(B * blocks, T, 4 * ROWS)
    dtypes = [gate.dtype] if bias is None else [gate.dtype, torch.float32]
    partials = torch.empty(len(dtypes), B, chunks, D, dtype=torch.float32, device=y.device)
    launch(
        _backward_kernel, (B * chunks * blocks,),
        dout, y, gate, None if bias is None else bias.contiguous(), dy, partials,
        dout.stride(0), dout.stride(1), y.stride(0), y.stride(1), gate.stride(0),
        T, chunks, rows, blocks,
        D=D, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
    sums = finish(partials, dtypes)
    dbias = y.new_empty(0) if bias is None else finish(sums[1].view(1, 1, B, D), [bias.dtype])[0].view(D)
    return dy, sums[0], dbias


@_gate_residual_backward.register_fake
def _(dout, y, gate, bias):
    return (
        y.new_empty(y.shape),
        gate.new_empty(gate.shape),
        y.new_empty(0) if bias is None else bias.new_empty(bias.shape),
    )


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, y, gate, bias = inputs
    ctx.save_for_backward(y, gate, bias)


def _grad(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    y, gate, bias = ctx.saved_tensors
    dy, dgate, dbias = _gate_residual_backward(dout, y, gate, bias)
    return dout, dy, dgate, None if bias is None else dbias


_gate_residual.register_autograd(_grad, setup_context=_save)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor, bias: Tensor | None = None) -> Tensor:
    """x + gate (y + bias), the gated residual sum of adaLN-Zero (arXiv 2212.09748, section 3.2).

    x, y: [B, T, D]; gate: [B, D]; bias: [D] or None, the bias of the product that made y. bfloat16, float16, float32 or
    float64 (which takes the reference); any strides, views with a contiguous last dimension without a copy. Returns
    [B, T, D] in the dtype of x. Differentiable in every tensor.
    Raises ValueError naming the argument whose type, shape, dtype or device is wrong.
    """
    op = "gate_residual"
    check_tensor(op, "x", x, ("B", "T", "D"))
    B, T, D = x.shape
    check_tensor(op, "y", y, (B, T, D), x)
    check_tensor(op, "gate", gate, (B, D), x)
    if bias is not None:
        check_tensor(op, "bias", bias, (D,), x)
    if not use_kernel(x, y, gate, bias):
        return gate_residual_reference(x, y, gate, bias)
    return _gate_residual(x, y, gate, bias)


def inspect_cases() -> Iterator[tuple[str, Callable]]:
    """(label, call): forward and backward at the shipped shapes, for `python -m soflow_kernels.inspect`."""
    for dtype, D in itertools.product((torch.bfloat16, torch.float32), (768, 1024, 1152)):
        x, gate, bias = (torch.empty(shape, dtype=dtype) for shape in ((256, 256, D), (256, D), (D,)))
        for b, name in ((None, ""), (bias, "+bias ")):
            size = f"{name}{D} {str(dtype)[6:]}"
            yield f"gate_residual {size}", partial(_gate_residual, x, x, gate, b)
            yield f"gate_residual backward {size}", partial(_gate_residual_backward, x, x, gate, b)
