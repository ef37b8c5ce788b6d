"""A function of tensors as a CUDA graph: its launches recorded once, and replayed as one.

What Python does in between is recorded away: numbers that change from call to call must reach the function in tensors.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..config.schema import Config, DiTConfig

WARM_UP = 3
"""Calls that run as they are before one is recorded: compilers, autotuners and lazy initialisations come to rest."""
WARM_UP_OF_REPLICAS = 11
"""The same where DistributedDataParallel is in it: as many as torch's notes on CUDA semantics ask for."""


def why_not_graphed(config: Config, precision: str, device: torch.device, ranks: int = 1) -> str | None:
    """Why a step is not made a CUDA graph unless it is asked for; None: every operation of it can be recorded."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    if ranks > 1:
        return f"{ranks} ranks exchange gradients in it"
    if torch.version.hip is not None:
        return "the GPU is not NVIDIA's"
    if not isinstance(config.model, DiTConfig):
        return "the network is no DiT"
    if config.run.compile:
        return "the blocks are compiled"
    if config.run.optimizer == "apex":
        return "the optimiser is apex's"
    if precision == "fp8" or config.guidance_precision == "fp8":
        return "float8 products are torchao's"
    return None


def record_graph(function: Callable[[], Any], stream: Any) -> tuple[Callable[[], None], Any]:
    """Record the launches of a function on a stream of the current device, running none of them. Returns (what runs
    them, what the function returned). Raises what the function raises.

    Other threads go on meanwhile, as one that writes a checkpoint.
    """
    graph = torch.cuda.CUDAGraph()
    failed: list[BaseException] = []

    def recorded() -> Any:
        try:
            return function()
        except BaseException as error:
            failed.append(error)
            raise

    try:
        # An operation that cannot be recorded also lets the end of the recording raise, before that has put the stream
        # back: hence the first of the two.
        with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            out = recorded()
    except BaseException:
        if not failed:
            raise
    else:
        return graph.replay, out
    # Not while the other is handled, nor kept here: the tracebacks of both hold all that was recorded, and in a cycle
    # they would hold it on.
    raise failed.pop()


class GraphedFunction:
    """`function` of tensors (or None) of fixed shapes, which returns a dict of tensors or one tensor.

    The first calls run it as it is, every one for good; then it is recorded, and later calls copy their arguments to
    where the recording reads them and replay it. Arguments of other shapes run as they are. The result is a copy. If it
    cannot be recorded, it runs as it is from then on, and `fault` says why; memory that runs out is raised.

    Everything happens on the device of the arguments, the calls before the recording and the recording itself on one
    stream. A recording has memory of its own, beside what is taken when it begins; `release` is called before, to give
    up what the calls have left and the recording makes anew. `stream`: that one; None: a new one.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        warm_up: int = WARM_UP,
        release: Callable[[], None] = lambda: None,
        stream: Any = None,
    ) -> None:
        self.function, self.left, self.release = function, warm_up, release
        self.places: list[Tensor | None] | None = None
        self.replay: Callable[[], None] | None = None
        self.out: Any = None
        self.fault: str | None = None
        self._stream = stream

    def __call__(self, *arguments: Tensor | None) -> Any:
        shapes = [None if value is None else (value.shape, value.dtype, value.device) for value in arguments]
        if self.places is None:
            self.shapes = shapes
            self.places = [None if value is None else value.clone() for value in arguments]
        if shapes != self.shapes or self.fault is not None:
            return self.function(*arguments)
        device = next(value.device for value in arguments if value is not None)
        if device.type != "cuda":
            return self._on_device(device, arguments)
        with torch.cuda.device(device):
            return self._on_device(device, arguments)

    def _on_device(self, device: torch.device, arguments: tuple[Tensor | None, ...]) -> Any:
        if self._stream is None and device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
        if self.left:
            self.left -= 1
            return self._on_side_stream(device, arguments)
        for place, value in zip(self.places or (), arguments, strict=True):
            if place is not None:
                place.copy_(value)  # pyright: ignore[reportArgumentType]
        if self.replay is None:
            self.release()
            try:
                self.replay, self.out = record_graph(lambda: self.function(*(self.places or ())), self._stream)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever an operation that cannot be recorded raises: none of them has run
                self.fault = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if self.replay is None:  # outside of the handler: the exception holds on to what was recorded
            return self.function(*arguments)
        self.replay()
        if isinstance(self.out, Tensor):
            return self.out.clone()
        return dict(zip(self.out, torch.stack(list(self.out.values())).unbind(), strict=True))

    def _on_side_stream(self, device: torch.device, arguments: tuple[Tensor | None, ...]) -> Any:
        """Call the function on the stream of the recording, as calls before it must be."""
        if device.type != "cuda":
            return self.function(*arguments)
        current = torch.cuda.current_stream(device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            out = self.function(*arguments)
        current.wait_stream(self._stream)
        return out
