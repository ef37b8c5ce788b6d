"""A function of tensors as a CUDA graph: its launches recorded once, and replayed as one.

What Python does in between is recorded away: numbers that change from call to call must reach the function in tensors.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3
"""Calls that run as they are before one is recorded: compilers, autotuners and lazy initialisations come to rest."""


def record_graph(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """Record the launches of a function, running none of them. Returns (what runs them, what the function returned)."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function()
    return graph.replay, out


class GraphedFunction:
    """`function` of tensors (or None) of fixed shapes, which returns a dict of tensors or one tensor.

    The first calls run it as it is, every one for good; then it is recorded, and later calls copy their arguments to
    where the recording reads them and replay it. Arguments of other shapes run as they are. The result is a copy.
    """

    def __init__(self, function: Callable[..., Any], warm_up: int = WARM_UP) -> None:
        self.function, self.left = function, warm_up
        self.places: list[Tensor | None] | None = None
        self.replay: Callable[[], None] | None = None
        self.out: Any = None

    def __call__(self, *arguments: Tensor | None) -> Any:
        shapes = [None if value is None else (value.shape, value.dtype, value.device) for value in arguments]
        if self.places is None:
            self.shapes = shapes
            self.places = [None if value is None else value.clone() for value in arguments]
        if shapes != self.shapes:
            return self.function(*arguments)
        if self.left:
            self.left -= 1
            return _on_side_stream(self.function, arguments)
        for place, value in zip(self.places, arguments, strict=True):
            if place is not None:
                place.copy_(value)  # pyright: ignore[reportArgumentType]
        if self.replay is None:
            self.replay, self.out = record_graph(lambda: self.function(*(self.places or ())))
        self.replay()
        if isinstance(self.out, Tensor):
            return self.out.clone()
        return dict(zip(self.out, torch.stack(list(self.out.values())).unbind(), strict=True))


def _on_side_stream(function: Callable[..., Any], arguments: tuple[Tensor | None, ...]) -> Any:
    """Call a function on a stream of its own, as calls before a recording must be."""
    device = next(value.device for value in arguments if value is not None)
    if device.type != "cuda":
        return function(*arguments)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        out = function(*arguments)
    torch.cuda.current_stream(device).wait_stream(stream)
    return out
