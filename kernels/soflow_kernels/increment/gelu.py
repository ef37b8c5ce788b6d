"""The increment of bias and tanh GELU (see the package), in float32:

    gelu(h) = h sigma(z),   z = 2 k (h + 0.044715 h^3),   k = sqrt(2 / pi)
    dz = 2 k dh (1 + 0.044715 (3 h (h + dh) + dh^2))
    d = sigma(z + dz) (dh + h sigma(-z) (1 - e^-dz))

x, dx: [..., D]; bias: [D]; bfloat16, float16 or float32, each of its own. Bytes, with S = one pass over x: 3 S, as only
the increment is written. At 16 384 x 4608 (a quarter of a batch of 256 with 256 tokens) in bf16 S is 151 MB: 0.11 ms at
4.3 TB/s.
"""

import math
from functools import partial

import torch
from torch import Tensor

from soflow_kernels._dispatch import check_dtype, check_quiet, inner_unit, jit, launch, operation, tl, use_kernel
from soflow_kernels.increment._pair import Pair, check_pair, wide
from soflow_kernels.increment._sigmoid import times_sigmoid_increment

# Tiles as in the GELU itself.
COLUMNS = 128
ROWS = 16
K, CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715
"""2 k and the other coefficient of z."""


def bias_gelu_increment_reference(
    x: Pair, bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:  # fmt: skip
    """`bias_gelu_increment` in plain PyTorch: any device and dtype."""
    h, dh = wide(x[0]), wide(x[1])
    h = h if bias is None else h + bias.to(h.dtype)
    # From the lower end to the upper one, so that no exponential overflows; in place, by operations that are fast on a
    # CPU, where `torch.where` takes as long as thirty products.
    step, end = dh.abs(), h + dh
    low, high = torch.minimum(h, end), torch.maximum(h, end)
    dz = (step * step).add_(low * high, alpha=3).mul_(K * CUBIC).add_(K).mul_(step)
    fall = dz.neg_().expm1_().mul_(_exponent(low).neg_().sigmoid_())
    rise = torch.addcmul(step, low, fall, value=-1).mul_(_exponent(high).sigmoid_())
    return rise.mul_(dh.sign()).to(dtype or x[1].dtype)


def _exponent(h: Tensor) -> Tensor:
    """z of h."""
    return (h * h).mul_(K * CUBIC).add_(K).mul_(h)


@jit
def _gelu_kernel(
    x_ptr, dx_ptr, bias_ptr, out_ptr, x_row, dx_row, N, D, blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """One tile of N rows of D columns, `blocks` of them side by side; NAME_row: strides between rows."""
    program = tl.program_id(0).to(tl.int64)
    rows = (program // blocks) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = (program % blocks) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (rows < N) & (cols < D)
    h = tl.load(x_ptr + rows * x_row + cols, mask=mask, other=0.0).to(tl.float32)
    dh = tl.load(dx_ptr + rows * dx_row + cols, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        h += tl.load(bias_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    z = 1.5957691216057308 * h * (1 + 0.044715 * h * h)
    dz = 1.5957691216057308 * dh * (1 + 0.044715 * (dh * dh + 3 * h * (h + dh)))
    tl.store(out_ptr + rows * D + cols, times_sigmoid_increment(h, dh, z, dz), mask=mask)


@operation("soflow::bias_gelu_increment")
def _bias_gelu(x: Tensor, dx: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    D = x.shape[-1]
    rows, drows = inner_unit(x.reshape(-1, D)), inner_unit(dx.reshape(-1, D))
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    N, blocks = rows.shape[0], -(-D // COLUMNS)
    launch(
        _gelu_kernel, (-(-N // ROWS) * blocks,),
        rows, drows, None if bias is None else bias.contiguous(), out, rows.stride(0), drows.stride(0), N, D, blocks,
        ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
    return out


@_bias_gelu.register_fake
def _(x, dx, bias, dtype):
    return x.new_empty(x.shape, dtype=dtype)


def bias_gelu_increment(x: Pair, bias: Tensor | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
    """The increment of the tanh GELU of x + bias, in `dtype` (None: that of the increment of x).

    x: a pair of [..., D], whose value lacks `bias` [D] (None: none); bfloat16, float16, float32 or float64 (which takes
    the reference); no gradient.
    Raises ValueError naming the argument that is wrong or requires a gradient.
    """
    op = "bias_gelu_increment"
    h, dh = check_pair(op, "x", x, (..., "D"))
    if bias is not None:
        check_quiet(op, "bias", bias, (h.shape[-1],), h)
    check_dtype(op, "dtype", dtype)
    if not use_kernel(h, dh, bias) or not h.shape[-1]:
        return bias_gelu_increment_reference(x, bias, dtype)
    return _bias_gelu(h, dh, bias, dtype or dh.dtype)


def inspect_cases():
    """(label, call): at the shipped shapes, for `python -m soflow_kernels.inspect`. "mixed": the bias in float32."""
    half, single = torch.bfloat16, torch.float32
    for kind, wide_dtype, low in (("bfloat16", half, half), ("float32", single, single), ("mixed", single, half)):
        for D in (3072, 4096, 4608):
            x, bias = torch.empty(16384, D, dtype=low), torch.empty(D, dtype=wide_dtype)
            yield f"bias_gelu_increment {D} {kind}", partial(_bias_gelu, x, x, bias, low)
