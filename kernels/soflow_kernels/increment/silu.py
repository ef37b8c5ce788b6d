"""SiLU of a pair (value and increment, see the package): h sigma(h), in float32.

x: [2, ...], bfloat16, float16 or float32. Bytes, with S = one pass over the pair: 2 S.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from soflow_kernels._dispatch import check_dtype, check_pair, jit, launch, tl, use_kernel
from soflow_kernels.increment._sigmoid import COLUMNS, sigmoid_increment, times_sigmoid, wide


def silu_increment_reference(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`silu_increment` in plain PyTorch: any device and dtype."""
    h, dh = wide(x).unbind()
    out = torch.stack([F.silu(h), dh * torch.sigmoid(h + dh) + h * sigmoid_increment(h, dh)])
    return out.to(dtype or x.dtype)


@jit
def _silu_kernel(x_ptr, out_ptr, N, COLUMNS: tl.constexpr):
    """N: elements of the value, after which the increment lies."""
    at = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    mask = at < N
    h = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    dh = tl.load(x_ptr + N + at, mask=mask, other=0.0).to(tl.float32)
    out, dout = times_sigmoid(h, dh, h, dh)
    tl.store(out_ptr + at, out, mask=mask)
    tl.store(out_ptr + N + at, dout, mask=mask)


@torch.library.custom_op("soflow::silu_increment", mutates_args=())
def _silu(x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    N = x[0].numel()
    launch(_silu_kernel, (-(-N // COLUMNS),), x, out, N, COLUMNS=COLUMNS, num_warps=4)
    return out


@_silu.register_fake
def _(x, dtype):
    return x.new_empty(x.shape, dtype=dtype)


def silu_increment(x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """SiLU of a pair [2, ...], as a pair of `dtype` (None: that of x).

    x: bfloat16, float16, float32 or float64 (which takes the reference); no gradient.
    Raises ValueError naming the argument that is wrong or requires a gradient.
    """
    check_pair("silu_increment", "x", x, (..., "elements"))
    check_dtype("silu_increment", "dtype", dtype)
    return _silu(x, dtype or x.dtype) if use_kernel(x) else silu_increment_reference(x, dtype)


def inspect_cases():
    """(label, call): at the shipped shapes, for `python -m soflow_kernels.inspect`."""
    for dtype in (torch.bfloat16, torch.float32):
        for D in (768, 1024, 1152):
            yield f"silu_increment {D} {str(dtype)[6:]}", partial(_silu, torch.zeros(2, 2, D, dtype=dtype), dtype)
