"""Where an operation runs: the Triton kernel or its PyTorch reference. Argument checks and kernel launches.

Kernels run for tensors on a GPU, and under Triton's interpreter (TRITON_INTERPRET=1 before the first import) for
tensors on the CPU too. Everything else takes the reference: no triton, SOFLOW_KERNELS=reference, float64, forward-mode
AD, torch.func transforms, and tensors that wrap others (DTensor), whose own dispatch then does what the reference says.
"""

import collections
import contextlib
import os
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from soflow_kernels._ops import add_op_namespace_prefix

try:
    import triton
    import triton.language as tl
    from triton import knobs

    INTERPRETED = bool(knobs.runtime.interpret)
except ImportError:  # the references work without triton
    triton = None
    tl = types.SimpleNamespace(constexpr=None)
    INTERPRETED = False

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MODES = ("auto", "reference")

Shape = tuple[int | str | types.EllipsisType, ...]
"""A wanted shape: a name stands for any size, and `...` at the front for any number of dimensions."""

_mode = os.environ.get("SOFLOW_KERNELS", "auto")
if _mode not in MODES:
    raise ValueError(f"SOFLOW_KERNELS must be one of {', '.join(MODES)}, got {_mode!r}")

_simulated = False  # True while `as_on_gpu` is active
_recorded: Any = None  # what launches are appended to while `recording` is active


def jit(function: Callable) -> Any:
    """`triton.jit` where triton is installed; elsewhere the function itself, which is then never launched."""
    return function if triton is None else triton.jit(function)


@contextlib.contextmanager
def mode(name: str) -> Iterator[None]:
    """Within the context, kernels where they apply ("auto") or never ("reference")."""
    global _mode
    if name not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {name!r}")
    before, _mode = _mode, name
    try:
        yield
    finally:
        _mode = before


def why_reference() -> str | None:
    """Why no kernel runs in this process, or None if kernels run."""
    if _mode == "reference":
        return "SOFLOW_KERNELS=reference"
    if triton is None:
        return "triton is not installed"
    if not INTERPRETED and not torch.cuda.is_available():
        return "no GPU"
    return None


def on_gpu(tensor: Tensor) -> bool:
    """Whether a tensor goes the ways of tensors on a GPU: it is on one, or has no data and is to be taken so."""
    return tensor.is_cuda or _simulated


@contextlib.contextmanager
def as_on_gpu() -> Iterator[None]:
    """Within the context, tensors hold no data and go the ways of tensors on a GPU: `on_gpu` is true of all of them.

    For predictions about a step on a GPU that is not here. Tensors say "cpu", as torch without CUDA has no autograd
    for CUDA tensors; operations take their kernels (triton need not be installed), of which only the fake
    implementations are asked. Real tensors are refused by torch. `mode("reference")` stays in force.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), _simulating():
        yield


@contextlib.contextmanager
def _simulating() -> Iterator[None]:
    global _simulated
    before, _simulated = _simulated, True
    try:
        yield
    finally:
        _simulated = before


@contextlib.contextmanager
def launches_dropped() -> Iterator[None]:
    """Within the context, tensors on the CPU go the ways of tensors on a GPU, and launches are prepared but not made:
    what an operation of ours returns has no defined contents.

    For the host's part of the time: checks, dispatch, allocation and the arguments of launches.
    """
    with _simulating(), recording(collections.deque(maxlen=0)):
        yield


def transformed() -> bool:
    """Whether forward-mode AD or a torch.func transform is in action, which no kernel and no autograd node follows."""
    # A library operation has no forward-mode formula: a dual tensor would lose its tangent without a word.
    if forward_ad._current_level >= 0:
        return True
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _wraps_others(tensor: Tensor) -> bool:
    """Whether a tensor has no memory of its own: DTensor, an asynchronous result, a quantised weight."""
    return type(tensor) is not Tensor and hasattr(type(tensor), "__tensor_flatten__")


def use_kernel(*tensors: Tensor | None) -> bool:
    """Whether these arguments of an operation (tensors, or None for an optional one) go to its kernel."""
    if _mode == "reference" or (triton is None and not _simulated) or transformed():
        return False
    for tensor in tensors:
        if tensor is not None:
            on_device = on_gpu(tensor) or INTERPRETED
            if not on_device or tensor.dtype not in KERNEL_DTYPES or _wraps_others(tensor):
                return False
    return True


def check_tensor(op: str, name: str, value: Any, shape: Shape, like: Tensor | None = None) -> None:
    """Raise ValueError unless `value` is a dense floating tensor of `shape`, placed as `like` is (device, DTensor).

    The message begins with the names of the operation and of the argument.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"{op}: {name} must be a tensor of shape {_text(shape)}, got {type(value).__name__}")
    if not torch.compiler.is_compiling() and (value.layout is not torch.strided or value.is_nested):
        kind = "a nested one" if value.is_nested else f"layout {value.layout}"
        raise ValueError(f"{op}: {name} must be a dense tensor, got {kind}")
    if value.shape != shape and not _fits(value.shape, shape):
        raise ValueError(f"{op}: {name} must have shape {_text(shape)}, got {_text(value.shape)}")
    if not value.dtype.is_floating_point:
        raise ValueError(f"{op}: {name} must be bfloat16, float16, float32 or float64, got {value.dtype}")
    if like is None:
        return
    if value.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device}, got {value.device}")
    if _distributed(value) != _distributed(like):
        wrong = (
            "a DTensor, as the first argument is, got a plain one"
            if _distributed(like)
            else "a plain tensor, got DTensor"
        )
        raise ValueError(f"{op}: {name} must be {wrong}")


def _distributed(tensor: Tensor) -> bool:
    # By name, because importing the class takes longer than the rest of this package.
    return type(tensor) is not Tensor and type(tensor).__name__ == "DTensor"


def check_quiet(op: str, name: str, value: Any, shape: Shape, like: Tensor | None = None) -> None:
    """`check_tensor` for a tensor that must not require a gradient either."""
    check_tensor(op, name, value, shape, like)
    if torch.is_grad_enabled() and value.requires_grad:
        raise ValueError(f"{op}: {name} must not require a gradient: increments have none")


def check_plain(op: str, name: str, value: Tensor) -> None:
    """Raise ValueError for a tensor that wraps others (DTensor and its like), which the operation cannot follow."""
    if _wraps_others(value):
        raise ValueError(f"{op}: {name} must be a plain tensor, got {type(value).__name__}")


def check_dtype(op: str, name: str, dtype: torch.dtype | None) -> None:
    """Raise ValueError unless `dtype` is None or a floating dtype of the operations."""
    if dtype is not None and dtype not in (*KERNEL_DTYPES, torch.float64):
        raise ValueError(f"{op}: {name} must be bfloat16, float16, float32 or float64, got {dtype}")


def _fits(given: tuple[int, ...], shape: Shape) -> bool:
    if shape[0] is ...:
        shape = shape[1:]
        given = given[-len(shape) :]
    return len(given) == len(shape) and all(
        isinstance(wanted, str) or wanted == n for wanted, n in zip(shape, given, strict=True)
    )


def _text(shape: Shape) -> str:
    return "[" + ", ".join("..." if n is ... else str(n) for n in shape) + "]"


class Operation:
    """An operation of the library `soflow`, which is called without torch's dispatcher where nobody listens there.

    The way through it (autograd, modes, the check that no output is an argument) takes longer than the rest of a call.
    It is for whoever records gradients or looks on: torch.compile, dispatch and function modes, a profiler; for tensors
    that are more than their memory says, such as batches of vmap; and for arguments that its schema converts.
    """

    def __init__(self, name: str, function: Callable) -> None:
        self.function = function
        self.library = torch.library.custom_op(name, function, mutates_args=())
        self.register_fake = self.library.register_fake
        self.register_autograd = self.library.register_autograd

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self.library(*args, **named) if named or _listened_to(args) else self.function(*args)


def operation(name: str) -> Callable[[Callable], Operation]:
    """Make a function on tensors that it does not change the operation of that name, "soflow::NAME".

    In a build for the kernel hub it is in that build's library instead of `soflow` (see `_ops`).
    """
    return lambda function: Operation(add_op_namespace_prefix(name.removeprefix("soflow::")), function)


def _listened_to(args: tuple[Any, ...]) -> bool:
    """Whether a call that does not come from torch's dispatcher would be missed."""
    return (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch.autograd._profiler_enabled()
        or torch.autograd.profiler._is_profiler_enabled
        or torch.jit.is_tracing()
        or not all(map(_is_plain, args))
    )


_PLAIN_VALUES = (int, float, bool, type(None), torch.dtype)
_plain_keys: dict[str, int] = {}


def _is_plain(value: Any) -> bool:
    """Whether an argument is a number, flag or dtype as it is, or a tensor whose memory is what it stands for.

    Negated and batched tensors, and those without data, have other keys in torch's dispatcher than a fresh tensor.
    """
    if type(value) not in (Tensor, torch.nn.Parameter):
        return type(value) in _PLAIN_VALUES
    kind = value.device.type
    if kind == "meta":
        return False
    if kind not in _plain_keys:
        _plain_keys[kind] = torch._C._dispatch_keys(torch.empty(0, device=value.device)).raw_repr()
    return torch._C._dispatch_keys(value).raw_repr() == _plain_keys[kind]


def inner_unit(tensor: Tensor) -> Tensor:
    """The tensor itself where its last dimension is contiguous, else a contiguous copy. Other strides are free."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch `kernel` on a `grid` of programs, on the device of its first tensor. An empty grid launches nothing.

    args: tensors, numbers, or None for an optional tensor that is not given; options: constants, num_warps, num_stages,
    maxnreg (registers a thread, None: as many as the compiler takes; NVIDIA's alone has it).
    """
    if 0 in grid:
        return
    if torch.version.hip is not None:
        options.pop("maxnreg", None)
    if _recorded is not None:
        _recorded.append((kernel, args, options))
        return
    device = next(a.device for a in args if isinstance(a, torch.Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*args, **options)


@contextlib.contextmanager
def recording(launches: Any = None) -> Iterator[Any]:
    """Within the context, launches are appended to `launches` (None: a new list) instead of run, and it is yielded:
    `inspect` compiles them."""
    global _recorded
    before, _recorded = _recorded, [] if launches is None else launches
    try:
        yield _recorded
    finally:
        _recorded = before
