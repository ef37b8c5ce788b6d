"""A value and its increment, as arguments of the operations in this package."""

from typing import Any

import torch
from torch import Tensor

from soflow_kernels._dispatch import Shape, check_quiet

Pair = tuple[Tensor, Tensor]
"""The value h, and dh = h(end) - h(start) as a number of its own: two tensors of one shape, each with its own dtype and
strides. Whatever unpacks into two is taken for one."""


def check_pair(op: str, name: str, value: Any, shape: Shape, like: Tensor | None = None) -> Pair:
    """The pair, or ValueError naming the argument: two dense tensors of `shape` without gradient, placed as `like`."""
    try:
        h, dh = value
    except (TypeError, ValueError):
        raise ValueError(f"{op}: {name} must be a pair (value, increment), got {_what(value)}") from None
    check_quiet(op, f"the value of {name}", h, shape, like)
    check_quiet(op, f"the increment of {name}", dh, tuple(h.shape), h)
    return h, dh


def _what(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, (tuple, list)) else type(value).__name__


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float64 where it has that, in float32 elsewhere."""
    return tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)
