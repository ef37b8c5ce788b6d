"""Bias and tanh GELU of a pair (value and increment, see the package), in float32:

    gelu(h) = h sigma(z),   z = 2 k (h + 0.044715 h^3),   k = sqrt(2 / pi)
    dz = 2 k dh (1 + 0.044715 (3 h^2 + 3 h dh + dh^2))

x: [2, ..., D], bfloat16, float16 or float32; bias: [D]. Bytes, with S = one pass over the pair: 2 S. At 2 x 16 384 x
4608 (a quarter of a batch of 256 with 256 tokens) in bf16 S is 302 MB: 0.14 ms at 4.3 TB/s.
"""

import math
from functools import partial

import torch
from torch import Tensor

from soflow_kernels._dispatch import check_dtype, check_pair, check_quiet, jit, launch, tl, use_kernel
from soflow_kernels.increment._sigmoid import COLUMNS, sigmoid_increment, times_sigmoid, wide


def bias_gelu_increment_reference(
    x: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:  # fmt: skip
    """`bias_gelu_increment` in plain PyTorch: any device and dtype."""
    h, dh = wide(x).unbind()
    h = h if bias is None else h + bias.to(h.dtype)
    k, cubic = 2 * math.sqrt(2 / math.pi), 0.044715
    z = k * (h + cubic * h**3)
    dz = k * dh * (1 + cubic * (3 * h * h + 3 * h * dh + dh * dh))
    out = torch.stack([h * torch.sigmoid(z), dh * torch.sigmoid(z + dz) + h * sigmoid_increment(z, dz)])
    return out.to(dtype or x.dtype)


@jit
def _gelu_kernel(x_ptr, bias_ptr, out_ptr, N, D, HAS_BIAS: tl.constexpr, COLUMNS: tl.constexpr):
    """N: elements of the value, after which the increment lies."""
    at = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    mask = at < N
    h = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    dh = tl.load(x_ptr + N + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        h += tl.load(bias_ptr + at % D, mask=mask, other=0.0).to(tl.float32)
    z = 1.5957691216057308 * h * (1 + 0.044715 * h * h)
    dz = 1.5957691216057308 * dh * (1 + 0.044715 * (3 * h * h + 3 * h * dh + dh * dh))
    out, dout = times_sigmoid(h, dh, z, dz)
    tl.store(out_ptr + at, out, mask=mask)
    tl.store(out_ptr + N + at, dout, mask=mask)


@torch.library.custom_op("soflow::bias_gelu_increment", mutates_args=())
def _bias_gelu(x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    N = x[0].numel()
    launch(
        _gelu_kernel, (-(-N // COLUMNS),),
        x, x if bias is None else bias.contiguous(), out, N, x.shape[-1],
        HAS_BIAS=bias is not None, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
    return out


@_bias_gelu.register_fake
def _(x, bias, dtype):
    return x.new_empty(x.shape, dtype=dtype)


def bias_gelu_increment(x: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
    """tanh GELU of a pair [2, ..., D] whose value lacks `bias` [D] (None: none), as a pair of `dtype` (None: of x's).

    x, bias: bfloat16, float16, float32 or float64 (which takes the reference); no gradient.
    Raises ValueError naming the argument that is wrong or requires a gradient.
    """
    op = "bias_gelu_increment"
    check_pair(op, "x", x, (..., "D"))
    if bias is not None:
        check_quiet(op, "bias", bias, (x.shape[-1],), x)
    check_dtype(op, "dtype", dtype)
    if not use_kernel(x, bias):
        return bias_gelu_increment_reference(x, bias, dtype)
    return _bias_gelu(x, bias, dtype or x.dtype)


def inspect_cases():
    """(label, call): at the shipped shapes, for `python -m soflow_kernels.inspect`. "mixed": the bias in float32."""
    half, single = torch.bfloat16, torch.float32
    for kind, wide_dtype, low in (("bfloat16", half, half), ("float32", single, single), ("mixed", single, half)):
        for D in (3072, 4096, 4608):
            x, bias = torch.zeros(2, 32, D, dtype=low), torch.zeros(D, dtype=wide_dtype)
            yield f"bias_gelu_increment {D} {kind}", partial(_bias_gelu, x, bias, low)
