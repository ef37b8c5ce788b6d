"""Bias and tanh GELU of a DiT's MLP: out = gelu(x + bias), forward, and backward with the bias gradient.

    gelu(u)  = u s,  s = sigmoid(2 k (u + 0.044715 u^3)),  k = sqrt(2 / pi)       (since tanh z = 2 sigmoid(2 z) - 1)
    gelu'(u) = s + 2 k u s (1 - s) (1 + 0.134145 u^2)

x, out: [..., D]; bias: [D]; bfloat16, float16 or float32, dtypes may differ, float32 inside. Backward: dx = dout
gelu'(u), dbias = the sum of dx over rows, by partial sums. Kept for the backward: x alone, the product before its bias;
`bias_gelu_backward` writes out once more, for the product after it.

Bytes, with S = one pass over x: forward 2 S, backward 3 S. At 65 536 x 4608 in bf16 S is 604 MB: 0.28 and 0.42 ms at
4.3 TB/s. Source: Hendrycks & Gimpel 2016, arXiv 1606.08415, section 2, and the MLP of arXiv 2212.09748.

Legend of the kernels: x as N rows of D columns, NAME_row the stride between rows of a tensor, `blocks` tiles side by
side. A program of the forward makes one tile of ROWS x COLUMNS; one of the backward goes down `rows` rows (its chunk)
of COLUMNS columns, tile by tile. partial_ptr: [1, 1, chunks, D], what each of them adds to dbias.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from soflow_kernels._dispatch import check_tensor, inner_unit, jit, launch, on_gpu, operation, tl, use_kernel
from soflow_kernels._reduce import finish

# Tiles of 128 columns, a divisor of every usual width. With 4 warps a thread has two 16-byte bf16 loads of 16 rows; the
# backward, which has several tensors under way, one of each of 8.
COLUMNS = 128
ROWS = 16
BACKWARD_ROWS = 8
# Programs of the backward, which loops over rows: its partial sums are one row of [D] floats for each.
BACKWARD_PROGRAMS = 4096


def bias_gelu_reference(x: Tensor, bias: Tensor) -> Tensor:
    """`bias_gelu` in plain PyTorch: any device and dtype, any order of differentiation."""
    out = F.gelu(x + bias, approximate="tanh")
    return out if out.dtype == x.dtype else out.to(x.dtype)


def bias_gelu_backward_reference(dout: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`bias_gelu_backward` in plain PyTorch: any device and dtype."""
    u = x + bias
    dx = torch.ops.aten.gelu_backward(dout.to(u.dtype), u, approximate="tanh")
    dbias = torch.atleast_2d(dx).flatten(0, -2).sum(0).to(bias.dtype)
    return dx.to(x.dtype), dbias, F.gelu(u, approximate="tanh").to(x.dtype)


def linear_gelu_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`linear_gelu` in plain PyTorch: any device and dtype, any order of differentiation."""
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


@jit
def _exp_inner(u):
    # exp(-2 k (u + 0.044715 u^3)), so that s = 1 / (1 + exp), which does not cancel for u << 0 as 1 + tanh does.
    return tl.exp(-1.5957691216057308 * u * (1 + 0.044715 * u * u))


@jit
def _forward_kernel(x_ptr, bias_ptr, out_ptr, x_row, N, D, blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    rows = (program // blocks) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = (program % blocks) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (rows < N) & (cols < D)
    bias = tl.load(bias_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    u = tl.load(x_ptr + rows * x_row + cols, mask=mask, other=0.0).to(tl.float32) + bias
    tl.store(out_ptr + rows * D + cols, u / (1 + _exp_inner(u)), mask=mask)


@jit
def _backward_kernel(
    dout_ptr, x_ptr, bias_ptr, dx_ptr, out_ptr, partial_ptr, dout_row, x_row, N, D, blocks, rows,
    RECOMPUTE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    chunk = program // blocks
    cols = (program % blocks) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    # Loaded as a tile, which lies in registers as those of x do. A row of it lies as 128 columns do, and so would then
    # all else: 2 bytes at a time from shared memory.
    tile = cols + tl.zeros([ROWS, COLUMNS], tl.int32)
    bias = tl.load(bias_ptr + tile, mask=tile < D, other=0.0).to(tl.float32)
    dbias = tl.zeros([ROWS, COLUMNS], tl.float32)
    last = tl.minimum((chunk + 1) * rows, N)
    for start in tl.range(chunk * rows, last, ROWS, num_stages=2):
        at = start + tl.arange(0, ROWS)[:, None]
        mask = (at < last) & (cols < D)
        whole = tl.load(x_ptr + at * x_row + cols, mask=mask, other=0.0).to(tl.float32) + bias
        dout = tl.load(dout_ptr + at * dout_row + cols, mask=mask, other=0.0).to(tl.float32)
        # The slope is constant beyond 10, where the exponential would soon overflow.
        u = tl.clamp(whole, -10.0, 10.0, propagate_nan=tl.PropagateNan.ALL)
        e = _exp_inner(u)
        s = 1 / (1 + e)
        # 1 - s is e s, without the cancellation.
        dx = dout * s * (1 + 1.5957691216057308 * u * (e * s) * (1 + 0.134145 * u * u))
        dbias += tl.where(mask, dx, 0.0)
        tl.store(dx_ptr + at * D + cols, dx, mask=mask)
        if RECOMPUTE:
            # Below -10 the true s is 0 in float32, and what it multiplies may be large.
            tl.store(out_ptr + at * D + cols, whole * tl.where(whole < -10, 0.0, s), mask=mask)
    tl.store(partial_ptr + chunk * D + cols, tl.sum(dbias, axis=0)[None, :], mask=cols < D)


@operation("soflow::bias_gelu")
def _bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    D = x.shape[-1]
    rows = inner_unit(x.reshape(-1, D))
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    N, blocks = rows.shape[0], -(-D // COLUMNS)
    launch(
        _forward_kernel, (-(-N // ROWS) * blocks,),
        rows, bias.contiguous(), out, rows.stride(0), N, D, blocks, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
    return out


@_bias_gelu.register_fake
def _(x, bias):
    return x.new_empty(x.shape)


@operation("soflow::bias_gelu_backward")
def _bias_gelu_backward(dout: Tensor, x: Tensor, bias: Tensor, recompute: bool) -> tuple[Tensor, Tensor, Tensor]:
    D = x.shape[-1]
    x_rows, dout_rows = inner_unit(x.reshape(-1, D)), inner_unit(dout.reshape(-1, D))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out = torch.empty(x.shape if recompute else 0, dtype=x.dtype, device=x.device)
    N, blocks = x_rows.shape[0], -(-D // COLUMNS)
    rows = BACKWARD_ROWS * max(8, -(-N * blocks // (BACKWARD_ROWS * BACKWARD_PROGRAMS)))
    chunks = -(-N // rows)
    partials = torch.empty(1, 1, chunks, D, dtype=torch.float32, device=x.device)
    launch(
        _backward_kernel, (chunks * blocks,),
        dout_rows, x_rows, bias.contiguous(), dx, out if recompute else dx, partials,
        dout_rows.stride(0), x_rows.stride(0), N, D, blocks, rows,
        RECOMPUTE=recompute, ROWS=BACKWARD_ROWS, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
    return dx, finish(partials, [bias.dtype])[0].view(D), out


@_bias_gelu_backward.register_fake
def _(dout, x, bias, recompute):
    return x.new_empty(x.shape), bias.new_empty(bias.shape), x.new_empty(x.shape if recompute else 0)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grad(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
    return _bias_gelu_backward(dout, *ctx.saved_tensors, False)[:2]


_bias_gelu.register_autograd(_grad, setup_context=_save)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU of x + bias in its tanh form (arXiv 1606.08415, section 2).

    x: [..., D]; bias: [D]; bfloat16, float16, float32 or float64 (which takes the reference). Returns a tensor like x.
    Differentiable in both. Raises ValueError naming the argument whose type, shape, dtype or device is wrong.
    """
    op = "bias_gelu"
    check_tensor(op, "x", x, (..., "D"))
    check_tensor(op, "bias", bias, (x.shape[-1],), x)
    return _bias_gelu(x, bias) if use_kernel(x, bias) and x.shape[-1] else bias_gelu_reference(x, bias)


def bias_gelu_backward(dout: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `bias_gelu` and once more what it returned: (dx, dbias, gelu(x + bias)), in one pass.

    For a backward of one's own, in which the product after the GELU needs its input again and nobody kept it. dout: of
    the shape of x; shapes, dtypes and errors as in `bias_gelu`. Not differentiable.
    """
    op = "bias_gelu_backward"
    check_tensor(op, "x", x, (..., "D"))
    check_tensor(op, "dout", dout, tuple(x.shape), x)
    check_tensor(op, "bias", bias, (x.shape[-1],), x)
    if use_kernel(dout, x, bias) and x.shape[-1]:
        return _bias_gelu_backward(dout, x, bias, True)
    return bias_gelu_backward_reference(dout, x, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """tanh GELU of x weight^T + bias, in as few passes as the moment allows.

    x: [..., K]; weight: [D, K]; bias: [D]; all of one dtype unless under autocast. Returns [..., D].
    Without gradient on an NVIDIA GPU the product's own epilogue does it, in float32 to about 1e-5 (on the CPU that
    epilogue is the erf form, so it is not used there); with gradient the product leaves out its bias and `bias_gelu`
    follows; elsewhere the reference.
    Raises ValueError naming the argument whose type, shape, dtype or device is wrong.
    """
    op = "linear_gelu"
    check_tensor(op, "x", x, (..., "K"))
    check_tensor(op, "weight", weight, ("D", x.shape[-1]), x)
    check_tensor(op, "bias", bias, (weight.shape[0],), x)
    for name, value in (("weight", weight), ("bias", bias)):
        if value.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"{op}: {name} must be {x.dtype} like x, got {value.dtype}")
    if not use_kernel(x, weight, bias):
        return linear_gelu_reference(x, weight, bias)
    epilogue = (
        on_gpu(x)
        and torch.version.hip is None
        and x.dtype == weight.dtype == bias.dtype
        and not torch.is_autocast_enabled(x.device.type)
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad))
    )
    if epilogue:
        out = torch._addmm_activation(bias, x.reshape(-1, x.shape[-1]), weight.t(), use_gelu=True)
        return out.view(*x.shape[:-1], weight.shape[0])
    return bias_gelu(F.linear(x, weight), bias)


def inspect_cases() -> Iterator[tuple[str, Callable]]:
    """(label, call): forward and backward at the shipped shapes, for `python -m soflow_kernels.inspect`."""
    for dtype, D in itertools.product((torch.bfloat16, torch.float32), (3072, 4096, 4608)):
        x, bias = torch.empty(256, 256, D, dtype=dtype), torch.empty(D, dtype=dtype)
        size = f"{D} {str(dtype)[6:]}"
        yield f"bias_gelu {size}", partial(_bias_gelu, x, bias)
        for recompute in (False, True):
            name = f"bias_gelu backward{' and output' * recompute} {size}"
            yield name, partial(_bias_gelu_backward, x, x, bias, recompute)
