"""Scaled dot-product attention by several implementations, and why one of them cannot be used here.

    flash4           flash_attn.cute of flash-attn-4, Hopper and Blackwell
    flash3           flash_attn_interface of flash_attn_3, Hopper
    flash2           flash-attn, Ampere and later
    xformers         memory_efficient_attention, which picks a kernel itself
    sdpa-cudnn, sdpa-flash, sdpa-efficient, sdpa-math    one kernel of torch
    sdpa             torch picks one by shape and dtype

They agree to rounding. No head dimension is padded here; what a package does inside is its own affair.
"""

import importlib.metadata
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ..config.schema import AttentionBackend
from ..errors import ConfigError

BACKENDS = get_args(AttentionBackend)[1:]
HALF = (torch.bfloat16, torch.float16)
KERNELS = {
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}


class Package(NamedTuple):
    """A package with attention kernels for NVIDIA GPUs, and what these need."""

    name: str
    install: str
    capability: tuple[int, int]
    """The least compute capability."""
    dtypes: tuple[torch.dtype, ...] = HALF
    largest: int = 256
    """Head dimension. Rows are read 16 bytes at a time, so it is also a multiple of that."""


PACKAGES = {
    "flash4": Package("flash-attn-4", "pip install flash-attn-4", (9, 0)),
    "flash3": Package(
        "flash_attn_3", "pip install flash_attn_3 --index-url https://download.pytorch.org/whl/cu130", (9, 0)
    ),
    "flash2": Package("flash-attn", "pip install flash-attn", (8, 0)),
    "xformers": Package("xformers", "pip install xformers", (7, 0), (*HALF, torch.float32), 2**16),
}


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str = "sdpa") -> Tensor:
    """softmax(q k' / sqrt(head_dim)) v for q, k, v [B, heads, T, head_dim], which may be views of one product.

    A backend is left to torch's choice where it does not take the dtype at all: samples and the checks of a bf16 run
    are in float32.
    """
    if backend == "sdpa" or not takes(backend, q.dtype, q.device.type):
        return F.scaled_dot_product_attention(q, k, v)
    if backend in KERNELS:
        with sdpa_kernel(KERNELS[backend]):
            return F.scaled_dot_product_attention(q, k, v)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, T, heads, head_dim], no copy
    function = _imported(backend)
    if backend == "xformers":
        return function(q, k, v).transpose(1, 2)
    out = function(q, k, v, deterministic=torch.are_deterministic_algorithms_enabled())
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)  # some versions give the log-sum-exp as well


def takes(backend: str, dtype: torch.dtype, device_type: str) -> bool:
    """Whether a backend computes in a dtype; those of "sdpa" and "sdpa-math" are all."""
    if backend in PACKAGES:
        return dtype in PACKAGES[backend].dtypes
    if backend == "sdpa-cudnn" or (backend == "sdpa-flash" and device_type != "cpu"):
        return dtype in HALF
    return backend != "sdpa-efficient" or dtype in (*HALF, torch.float32)


def _imported(backend: str) -> Callable[..., Any]:
    """The function of a package, imported on first use."""
    if backend == "flash4":
        from flash_attn.cute import flash_attn_func  # pyright: ignore[reportMissingImports]
    elif backend == "flash3":
        from flash_attn_interface import flash_attn_func  # pyright: ignore[reportMissingImports]
    elif backend == "flash2":
        from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]
    else:
        assert backend == "xformers", backend
        from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

        return memory_efficient_attention
    return flash_attn_func


def why_not(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why `attention` cannot use a backend on a device with operands of a dtype and head dimension; None: it can."""
    if backend in PACKAGES:
        return _not_importable(backend) or _not_on(PACKAGES[backend], backend, device, dtype, head_dim)
    if backend in ("sdpa", "sdpa-math"):
        return None
    if device.type != "cuda" and (backend, device.type) != ("sdpa-flash", "cpu"):
        return "needs a GPU"
    if not takes(backend, dtype, device.type):
        return _needs_dtype(HALF if backend in ("sdpa-cudnn", "sdpa-flash") else (*HALF, torch.float32))
    return _not_by_torch(backend, device, dtype, head_dim)


def require(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Raise ConfigError if a backend that was asked for cannot be used."""
    reason = why_not(backend, device, dtype, head_dim)
    if reason:
        raise ConfigError(f"--attention {backend}: {reason}")


def _not_importable(backend: str) -> str | None:
    package = PACKAGES[backend]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _imported(backend)
    except Exception as error:  # whatever a package raises that was built for another torch or CUDA
        if isinstance(error, ImportError) and version(package.name) is None:
            return f"{package.name} is not installed ({package.install})"
        return f"{package.name} cannot be imported: {in_short(error)}"
    return None


def _not_on(package: Package, backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return "needs an NVIDIA GPU"
    if dtype not in package.dtypes:
        return _needs_dtype(package.dtypes)
    here = torch.cuda.get_device_capability(device)
    least = max(package.capability, (8, 0)) if dtype == torch.bfloat16 else package.capability
    if here < least or (backend == "flash3" and here != least):
        exactly = "" if backend == "flash3" else " or more"
        return f"needs compute capability {least[0]}.{least[1]}{exactly}, the GPU has {here[0]}.{here[1]}"
    largest = 128 if backend == "flash4" and here[0] in (10, 11) else package.largest
    multiple = 16 // dtype.itemsize
    if head_dim > largest or head_dim % multiple:
        return f"head dimension {head_dim}: it takes multiples of {multiple} up to {largest}"
    return None


def _not_by_torch(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """What torch says when one of its kernels is to do a small case, of which a gradient will be asked."""
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
    """The version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def status(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[tuple[str, bool, str]]:
    """(backend, usable, what it is or why not) for every backend."""
    rows = []
    for backend in BACKENDS:
        reason = why_not(backend, device, dtype, head_dim)
        if backend in PACKAGES:
            name = PACKAGES[backend].name
            what = f"{name} {version(name) or ''}".rstrip()
        elif backend == "sdpa":
            what = "torch picks a kernel by shape and dtype"
        else:
            what = f"torch's {backend.removeprefix('sdpa-')} kernel"
        rows.append((backend, reason is None, reason or what))
    return rows


def flop_counter() -> FlopCounterMode:
    """torch's FLOP counter, taught the CPU's flash kernel, of which it would count nothing. Packages stay uncounted."""
    aten = torch.ops.aten
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *rest, **named: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda grad, q, k, v, *rest, **named: sdpa_backward_flop_count(grad, q, k, v)
        ),
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)
