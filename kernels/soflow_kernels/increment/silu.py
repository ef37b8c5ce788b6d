"""The increment of SiLU (see the package): of h sigma(h), in float32.

x, dx: [...], bfloat16, float16 or float32. Bytes, with S = one pass over x: 3 S, as only the increment is written.
"""

from functools import partial

import torch
from torch import Tensor

from soflow_kernels._dispatch import check_dtype, jit, launch, operation, tl, use_kernel
from soflow_kernels.increment._pair import Pair, check_pair, wide
from soflow_kernels.increment._sigmoid import sigmoid_increment, times_sigmoid_increment

COLUMNS = 1024


def silu_increment_reference(x: Pair, dtype: torch.dtype | None = None) -> Tensor:
    """`silu_increment` in plain PyTorch: any device and dtype."""
    h, dh = wide(x[0]), wide(x[1])
    return (dh * torch.sigmoid(h + dh) + h * sigmoid_increment(h, dh)).to(dtype or x[1].dtype)


@jit
def _silu_kernel(x_ptr, dx_ptr, out_ptr, N, COLUMNS: tl.constexpr):
    """N: all elements."""
    at = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    mask = at < N
    h = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    dh = tl.load(dx_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, times_sigmoid_increment(h, dh, h, dh), mask=mask)


@operation("soflow::silu_increment")
def _silu(x: Tensor, dx: Tensor, dtype: torch.dtype) -> Tensor:
    x, dx = x.contiguous(), dx.contiguous()
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    N = x.numel()
    launch(_silu_kernel, (-(-N // COLUMNS),), x, dx, out, N, COLUMNS=COLUMNS, num_warps=4)
    return out


@_silu.register_fake
def _(x, dx, dtype):
    return x.new_empty(x.shape, dtype=dtype)


def silu_increment(x: Pair, *, dtype: torch.dtype | None = None) -> Tensor:
    """The increment of SiLU(x), in `dtype` (None: that of the increment of x).

    x: a pair of one shape; bfloat16, float16, float32 or float64 (which takes the reference); no gradient.
    Raises ValueError naming the argument that is wrong or requires a gradient.
    """
    h, dh = check_pair("silu_increment", "x", x, (..., "elements"))
    check_dtype("silu_increment", "dtype", dtype)
    return _silu(h, dh, dtype or dh.dtype) if use_kernel(h, dh) else silu_increment_reference(x, dtype)


def inspect_cases():
    """(label, call): at the shipped shapes, for `python -m soflow_kernels.inspect`."""
    for dtype in (torch.bfloat16, torch.float32):
        for D in (768, 1024, 1152):
            x = torch.empty(64, D, dtype=dtype)
            yield f"silu_increment {D} {str(dtype)[6:]}", partial(_silu, x, x, dtype)
