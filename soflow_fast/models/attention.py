"""Scaled dot-product attention by several implementations, and why one of them cannot be used here.

`IMPLEMENTATIONS` lists them. They agree to rounding. No head dimension is padded here; a package may pad inside.

On a CPU in bfloat16 torch's own choice is its flash kernel, whose backward is slow for few tokens. There "sdpa" is
`_Products` instead, as far as its T x T matrices stay small beside the rest.
"""

import contextlib
import importlib.metadata
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from soflow_kernels import transformed

from ..errors import ConfigError

Backend = str | Callable[[Tensor, Tensor, Tensor], Tensor]
"""The name of an implementation, or a function of q, k, v [B, heads, T, head_dim] that returns the same shape."""

HALF = (torch.bfloat16, torch.float16)
SINGLE = (*HALF, torch.float32)
ANY = (*SINGLE, torch.float64)

LONGEST_PRODUCTS = 256
"""Tokens up to which products take the place of the CPU's flash kernel; their matrices grow with the square of them."""
CPU_MULTIPLIES_BF16: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()


# Import statements, as torch.compile traces them; it does not trace importlib.
def _flash4() -> Callable[..., Any]:
    from flash_attn.cute import flash_attn_func  # pyright: ignore[reportMissingImports]

    return flash_attn_func


def _flash3() -> Callable[..., Any]:
    from flash_attn_interface import flash_attn_func  # pyright: ignore[reportMissingImports]

    return flash_attn_func


def _flash3_packed() -> Callable[..., Any]:
    from flash_attn_interface import flash_attn_qkvpacked_func  # pyright: ignore[reportMissingImports]

    return flash_attn_qkvpacked_func


def _flash2_packed() -> Callable[..., Any]:
    from flash_attn import flash_attn_qkvpacked_func  # pyright: ignore[reportMissingImports]

    return flash_attn_qkvpacked_func


def _flash2() -> Callable[..., Any]:
    from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

    return flash_attn_func


def _xformers() -> Callable[..., Any]:
    from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

    return memory_efficient_attention


class Implementation(NamedTuple):
    """One way to compute attention, and what it needs."""

    dtypes: tuple[torch.dtype, ...]
    """The dtypes of its operands on a GPU."""
    kernel: SDPBackend | None = None
    """The kernel that torch is to take; None: torch chooses, or a package computes."""
    package: str = ""
    """The package to install, for NVIDIA GPUs; empty: torch itself."""
    load: Callable[[], Callable[..., Any]] | None = None
    """Imports the function of a package."""
    pip: str = ""
    """Further arguments of `pip install`."""
    capability: tuple[int, int] = (0, 0)
    """The least compute capability that a package supports."""
    largest: int = 256
    """The largest head dimension that a package supports. Rows are also multiples of 16 bytes."""
    packed: Callable[[], Callable[..., Any]] | None = None
    """Imports a package's function of q, k and v in one tensor, whose gradient comes in one tensor as well. (xformers
    puts gradients in one tensor of its own accord where the operands are views of one.)"""


_WHEELS = "--index-url https://download.pytorch.org/whl/cu130"

IMPLEMENTATIONS = {
    "flash4": Implementation(HALF, None, "flash-attn-4", _flash4, "", (9, 0)),  # Hopper and Blackwell
    "flash3": Implementation(
        HALF, None, "flash_attn_3", _flash3, _WHEELS, (9, 0), packed=_flash3_packed
    ),  # Hopper alone
    "flash2": Implementation(HALF, None, "flash-attn", _flash2, "", (8, 0), packed=_flash2_packed),  # Ampere and later
    "xformers": Implementation(SINGLE, None, "xformers", _xformers, "", (7, 0), 2**16),
    "sdpa-cudnn": Implementation(HALF, SDPBackend.CUDNN_ATTENTION),
    "sdpa-flash": Implementation(HALF, SDPBackend.FLASH_ATTENTION),
    "sdpa-efficient": Implementation(SINGLE, SDPBackend.EFFICIENT_ATTENTION),
    "sdpa-math": Implementation(ANY, SDPBackend.MATH),
    "sdpa": Implementation(ANY),  # torch picks a kernel by shape and dtype; in bf16 on a CPU, see `_of_torch`
}
BACKENDS = tuple(IMPLEMENTATIONS)
PACKAGES = {name: row for name, row in IMPLEMENTATIONS.items() if row.package}


class _Products(torch.autograd.Function):
    """softmax(q k' / sqrt(d)) v of bfloat16 by batched products, [B, heads, T, d].

    The scores and the gradient of the probabilities are float32, as in a flash kernel: the one goes into an
    exponential, of the other differences are taken. The probabilities are kept, in bfloat16.
    """

    @staticmethod
    def forward(ctx: Any, q, k, v):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # a batched product of strided ones is slower
        with torch.autocast("cpu", enabled=False):
            scores = (q.float() * q.shape[-1] ** -0.5) @ k.float().mT
        p = scores.softmax(-1).to(q.dtype)
        ctx.save_for_backward(q, k, v, p)
        return p @ v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, p = ctx.saved_tensors
        dout = dout.contiguous()
        with torch.autocast("cpu", enabled=False):  # a backward may be called under it
            dp = (dout.float() * q.shape[-1] ** -0.5) @ v.float().mT
        ds = torch.ops.aten._softmax_backward_data(dp, p.float(), -1, dp.dtype).to(q.dtype)
        return ds @ k, ds.mT @ q, p.mT @ dout


def _of_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The fastest that torch has: a kernel that it picks by shape and dtype, or products."""
    short_on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[-2] <= LONGEST_PRODUCTS
    if short_on_cpu and CPU_MULTIPLIES_BF16 and not transformed():
        return _Products.apply(q, k, v)  # pyright: ignore[reportReturnType]
    return F.scaled_dot_product_attention(q, k, v)


def attention(q: Tensor, k: Tensor, v: Tensor, backend: Backend = "sdpa") -> Tensor:
    """softmax(q k' / sqrt(head_dim)) v for q, k, v [B, heads, T, head_dim], which may be views of one tensor.

    Torch chooses where the named implementation does not take the dtype at all: samples and the checks of a bf16 run
    are in float32. A function as backend is called whatever the dtype.
    """
    if not isinstance(backend, str):
        return backend(q, k, v)
    if backend == "sdpa" or not takes(backend, q.dtype, q.device.type):
        return _of_torch(q, k, v)
    row = IMPLEMENTATIONS[backend]
    if row.kernel is not None:
        with sdpa_kernel(row.kernel):
            return F.scaled_dot_product_attention(q, k, v)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, T, heads, head_dim], no copy
    assert row.load is not None
    function = row.load()
    if backend == "xformers":
        return function(q, k, v).transpose(1, 2)
    out = function(q, k, v, deterministic=torch.are_deterministic_algorithms_enabled())
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)  # some versions return the log-sum-exp as well


def takes_packed(backend: Backend, dtype: torch.dtype, device_type: str) -> bool:
    """Whether a backend takes operands of a dtype in one tensor (`packed_attention`)."""
    return (
        isinstance(backend, str) and IMPLEMENTATIONS[backend].packed is not None and takes(backend, dtype, device_type)
    )


def packed_attention(qkv: Tensor, backend: str) -> Tensor:
    """Attention of q, k and v in one tensor [B, T, 3, heads, head_dim] -> [B, T, heads, head_dim]."""
    load = IMPLEMENTATIONS[backend].packed
    assert load is not None
    out = load()(qkv, deterministic=torch.are_deterministic_algorithms_enabled())
    return out[0] if isinstance(out, tuple) else out


def takes(backend: str, dtype: torch.dtype, device_type: str) -> bool:
    """Whether an implementation computes in a dtype. The CPU's flash kernel takes all."""
    return dtype in IMPLEMENTATIONS[backend].dtypes or (backend, device_type) == ("sdpa-flash", "cpu")


def why_not(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a backend cannot be used on a device with operands of a dtype and head dimension; None: it can."""
    row = IMPLEMENTATIONS[backend]
    if row.package:
        return _not_importable(row) or _not_on(backend, device, dtype, head_dim)
    if row.kernel in (None, SDPBackend.MATH):
        return None
    if device.type != "cuda" and (backend, device.type) != ("sdpa-flash", "cpu"):
        return "needs a GPU"
    if not takes(backend, dtype, device.type):
        return _needs_dtype(row.dtypes)
    return _not_by_torch(backend, device, dtype, head_dim)


def require(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Raise ConfigError if a backend that was asked for cannot be used."""
    reason = why_not(backend, device, dtype, head_dim)
    if reason:
        raise ConfigError(f"--attention {backend}: {reason}")


def _not_importable(row: Implementation) -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert row.load is not None
            row.load()
    except Exception as error:  # whatever a package raises that was built for another torch or CUDA
        if isinstance(error, ImportError) and version(row.package) is None:
            return f"{row.package} is not installed ({' '.join(['pip install', row.package, row.pip]).strip()})"
        return f"{row.package} cannot be imported: {in_short(error)}"
    return None


def _not_on(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    row = IMPLEMENTATIONS[backend]
    if device.type != "cuda" or torch.version.hip is not None:
        return "needs an NVIDIA GPU"
    if dtype not in row.dtypes:
        return _needs_dtype(row.dtypes)
    here = torch.cuda.get_device_capability(device)
    least = max(row.capability, (8, 0)) if dtype == torch.bfloat16 else row.capability
    if here < least or (backend == "flash3" and here != least):
        exactly = "" if backend == "flash3" else " or more"
        return f"needs compute capability {least[0]}.{least[1]}{exactly}, the GPU has {here[0]}.{here[1]}"
    largest = 128 if backend == "flash4" and here[0] in (10, 11) else row.largest
    multiple = 16 // dtype.itemsize
    if head_dim > largest or head_dim % multiple:
        return f"head dimension {head_dim}: it takes multiples of {multiple} up to {largest}"
    return None


def _not_by_torch(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Torch's reason for refusing a small case, of which a gradient will be asked, to one of its kernels."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            q, k, v = torch.zeros(3, 1, 1, 64, head_dim, device=device, dtype=dtype, requires_grad=True)
            attention(q, k, v, backend)
            return None
        except (RuntimeError, AssertionError) as error:
            # It warns "... not used because:", then why, and that the kernels that it was not asked for are disabled.
            said = [str(warning.message).split(" (Triggered internally")[0].strip() for warning in caught]
            told = [text for text in said if text and not text.endswith("because:") and "disabled" not in text]
            return " ".join(told[0].split()) if told else in_short(error)


def _needs_dtype(dtypes: tuple[torch.dtype, ...]) -> str:
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    return f"needs {' or '.join(names[dtype] for dtype in dtypes)}"


def in_short(error: Exception) -> str:
    """The first line of an error's message, or its type."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def version(package: str) -> str | None:
    """The version of an installed package; None: it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def status(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[tuple[str, bool, str]]:
    """(backend, usable, what it is or why it cannot be used) for every backend."""
    rows = []
    for name, row in IMPLEMENTATIONS.items():
        if row.package:
            what = f"{row.package} {version(row.package) or ''}".rstrip()
        elif row.kernel is None:
            what = "torch picks a kernel by shape and dtype"
        else:
            what = f"torch's {name.removeprefix('sdpa-')} kernel"
        reason = why_not(name, device, dtype, head_dim)
        rows.append((name, reason is None, reason or what))
    return rows


class _NoModules(contextlib.nullcontext):
    """A module tracker that sees none: torch's hooks all modules, and a watched DiT does not fuse its layers."""

    parents = frozenset({"Global"})


def flop_counter() -> FlopCounterMode:
    """Torch's FLOP counter of totals, taught the CPU's flash kernel. Packages stay uncounted."""
    aten = torch.ops.aten
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *rest, **named: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda grad, q, k, v, *rest, **named: sdpa_backward_flop_count(grad, q, k, v)
        ),
    }
    counter: Any = FlopCounterMode(display=False, custom_mapping=formulas)
    counter.mod_tracker = _NoModules()
    return counter
