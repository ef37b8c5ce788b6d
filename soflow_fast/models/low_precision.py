"""Weights as products take them: copies in low precision beside float32 masters, and stacks of weights in one piece.

Neither is a parameter: `state_dict`, `parameters()` and the optimiser see the masters. A copy follows its master: where
that was changed by anybody but the optimiser, which writes both, it is made again at its next use. Changes
show in torch's version counters, which writes through `.data` and torch's fused optimisers do not move: after these,
`DiT.forget_copies`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from . import float8
from .fused_layers import Weight


def _place(tensor: Tensor) -> tuple[Any, Any]:
    """The memory that a tensor begins at; unlike its address, known for tensors without data too."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset()


def _state_of(layer: nn.Linear) -> tuple | None:
    """What shows whether a layer's parameters were changed; None: nothing does, as for tensors of inference mode."""
    if layer.weight.is_inference() or layer.bias.is_inference():
        return None
    return layer.weight._version, layer.bias._version, _place(layer.weight), _place(layer.bias)


class Copy:
    """A layer's weight and bias in another dtype."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight, bias
        self.seen: tuple | None = None

    def follow(self, layer: nn.Linear) -> None:
        """Copy the layer's parameters, unless they are those that were copied last."""
        now = _state_of(layer)
        if now is None or now != self.seen:
            with torch.no_grad():
                self.weight.copy_(layer.weight)
                self.bias.copy_(layer.bias)
            self.seen = now

    def forget(self) -> None:
        """Copy anew at the next use. For optimisers that leave no trace of what they change, as torch's fused ones."""
        self.seen = None

    def trust(self, layer: nn.Linear) -> None:
        """Take the copy for a true one: whoever changed the layer has written it too."""
        self.seen = _state_of(layer)


def operands(layer: nn.Linear, dtype: torch.dtype) -> Weight:
    """The layer's weight for products in a dtype: itself, its kept copy, or a copy made now."""
    master, bias = layer.weight, layer.bias
    if master.dtype == dtype:
        return Weight(master, bias, master, bias)
    multiply = float8.product(layer) if dtype == torch.bfloat16 else None
    copy: Any = getattr(layer, "copy", None)
    if copy is None or copy.weight.dtype != dtype or copy.weight.device != master.device:
        return Weight(master, bias, master.detach().to(dtype), bias.detach().to(dtype), multiply)
    copy.follow(layer)
    return Weight(master, bias, copy.weight, copy.bias, multiply)


class Stack:
    """Weights [N_i, K] and biases [N_i] of several layers in one piece [N, K] and [N], of one dtype."""

    def __init__(self, layers: list[nn.Linear], dtype: torch.dtype) -> None:
        like = layers[0].weight
        rows = [len(layer.weight) for layer in layers]
        self.weight = torch.empty(sum(rows), like.shape[1], dtype=dtype, device=like.device)
        self.bias = torch.empty(sum(rows), dtype=dtype, device=like.device)
        self.parts = list(zip(self.weight.split(rows), self.bias.split(rows), strict=True))

    def holds(self, weights: list[Weight]) -> bool:
        """Whether these are its parts."""
        places = [_place(tensor) for part in self.parts for tensor in part]
        return places == [_place(tensor) for weight in weights for tensor in weight[2:4]]


def keep_copies(layers: list[nn.Linear], stacked: list[nn.Linear], dtype: torch.dtype) -> Stack:
    """Give all these layers copies in a dtype, those of the second list in the stack that is returned."""
    each: list[Any] = layers
    for layer in each:
        layer.copy = Copy(torch.empty_like(layer.weight, dtype=dtype), torch.empty_like(layer.bias, dtype=dtype))
    stack = Stack(stacked, dtype)
    each = stacked
    for layer, part in zip(each, stack.parts, strict=True):
        layer.copy = Copy(*part)
    return stack


@torch.no_grad()
def stack_in_place(layers: list[nn.Linear]) -> Stack:
    """Move the layers' parameters into one piece; they stay the parameters that they are, but views of one storage."""
    stack = Stack(layers, layers[0].weight.dtype)
    for layer, (weight, bias) in zip(layers, stack.parts, strict=True):
        for parameter, place in ((layer.weight, weight), (layer.bias, bias)):
            place.copy_(parameter)
            parameter.data = place
    return stack
