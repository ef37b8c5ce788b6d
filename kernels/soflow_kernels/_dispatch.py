"""Where an operation runs: the Triton kernel or its PyTorch reference. Argument checks and kernel launches.

Kernels run for tensors on a GPU, and under Triton's interpreter (TRITON_INTERPRET=1 before the first import) for
tensors on the CPU too. Everything else takes the reference: no triton, SOFLOW_KERNELS=reference, float64, forward-mode
AD, torch.func transforms.
"""

import contextlib
import os
import types

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

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

_mode = os.environ.get("SOFLOW_KERNELS", "auto")
if _mode not in MODES:
    raise ValueError(f"SOFLOW_KERNELS must be one of {', '.join(MODES)}, got {_mode!r}")

_recorded = None  # a list while `recording` is active


def jit(function):
    """`triton.jit` where triton is installed; elsewhere the function itself, which is then never launched."""
    return function if triton is None else triton.jit(function)


@contextlib.contextmanager
def mode(name):
    """Within the context, kernels where they apply ("auto") or never ("reference")."""
    global _mode
    if name not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {name!r}")
    before, _mode = _mode, name
    try:
        yield
    finally:
        _mode = before


def why_reference():
    """Why no kernel runs in this process, or None if kernels run."""
    if _mode == "reference":
        return "SOFLOW_KERNELS=reference"
    if triton is None:
        return "triton is not installed"
    if not INTERPRETED and not torch.cuda.is_available():
        return "no GPU"
    return None


def transformed():
    """Whether forward-mode AD or a torch.func transform is in action, which no kernel and no autograd node follows."""
    # A library operation has no forward-mode formula: a dual tensor would lose its tangent without a word.
    if forward_ad._current_level >= 0:
        return True
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def use_kernel(*tensors):
    """Whether these arguments of an operation (tensors, or None for an optional one) go to its kernel.

    Subclasses that wrap other tensors (DTensor, torchao's quantised weights) do not: they follow the reference by
    rules of their own, or say which operation they do not know.
    """
    if _mode == "reference" or triton is None or transformed():
        return False
    for tensor in tensors:
        if tensor is None:
            continue
        if not ((tensor.is_cuda or INTERPRETED) and tensor.dtype in KERNEL_DTYPES):
            return False
        if is_traceable_wrapper_subclass(tensor):
            return False
    return True


def check_tensor(op, name, value, shape, like=None):
    """Raise ValueError unless `value` is a floating tensor of `shape` on the device of `like`.

    In `shape` a name stands for any size, and `...` at the front for any number of dimensions.
    """
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{op}: {name} must be a tensor of shape {_text(shape)}, got {type(value).__name__}")
    if value.shape != shape and not _fits(value.shape, shape):
        raise ValueError(f"{op}: {name} must have shape {_text(shape)}, got {_text(value.shape)}")
    if not value.dtype.is_floating_point:
        raise ValueError(f"{op}: {name} must be bfloat16, float16, float32 or float64, got {value.dtype}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device}, got {value.device}")


def check_pair(op, name, value, shape, like=None):
    """`check_quiet`, of a pair [2, ...]: a value and its increment."""
    check_quiet(op, name, value, shape, like)
    if value.shape[0] != 2 or value.dim() < 2:
        raise ValueError(f"{op}: {name} must be a pair [2, ...], got {list(value.shape)}")


def check_quiet(op, name, value, shape, like=None):
    """`check_tensor`, of a tensor that must not ask for a gradient either."""
    check_tensor(op, name, value, shape, like)
    if torch.is_grad_enabled() and value.requires_grad:
        raise ValueError(f"{op}: {name} must not require a gradient: increments have none")


def check_plain(op, name, value):
    """Raise ValueError for a tensor that wraps others (DTensor and its like), which the operation cannot follow."""
    if is_traceable_wrapper_subclass(value):
        raise ValueError(f"{op}: {name} must be a plain tensor, got {type(value).__name__}")


def check_dtype(op, name, dtype):
    """Raise ValueError unless `dtype` is None or a floating dtype of the operations."""
    if dtype is not None and dtype not in (*KERNEL_DTYPES, torch.float64):
        raise ValueError(f"{op}: {name} must be bfloat16, float16, float32 or float64, got {dtype}")


def _fits(given, shape):
    if shape[0] is ...:
        shape = shape[1:]
        given = given[-len(shape) :]
    return len(given) == len(shape) and all(
        isinstance(wanted, str) or wanted == n for wanted, n in zip(shape, given, strict=True)
    )


def _text(shape):
    return "[" + ", ".join("..." if n is ... else str(n) for n in shape) + "]"


def inner_unit(tensor):
    """The tensor itself where its last dimension is contiguous, else a contiguous copy. Other strides are free."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def launch(kernel, grid, *args, **options):
    """Launch `kernel` on a tuple `grid` of programs, on the device of its first tensor. Launches no empty grid."""
    if 0 in grid:
        return
    if _recorded is not None:
        _recorded.append((kernel, args, options))
        return
    device = next(a.device for a in args if isinstance(a, torch.Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*args, **options)


@contextlib.contextmanager
def recording():
    """Within the context, launches are appended to the list that it yields instead of run: `inspect` compiles them."""
    global _recorded
    _recorded = []
    try:
        yield _recorded
    finally:
        _recorded = None
