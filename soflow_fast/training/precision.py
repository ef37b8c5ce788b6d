"""The device of a run, the precision of its products, and parameters in low precision."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError

OPERAND = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
"""The dtype of a product's operands, by the name of the precision."""


def resolve_device(name: str) -> torch.device:
    """ "auto" -> the GPU if there is one, else the CPU. Raises ConfigError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0].split(". ")[0]
        raise ConfigError(f"--device {name}: {reason}") from None
    if device.type == "meta":
        raise ConfigError(f"--device {name}: holds no data")
    return device


def resolve_devices(names: str) -> list[torch.device]:
    """ "auto" -> every GPU if there is one, else the CPU; else devices by name, with commas between them.

    Raises ConfigError for one that is not there, one that is named twice, and for several kinds: they round apart.
    """
    if names == "auto" and torch.cuda.is_available():
        names = ",".join(f"cuda:{k}" for k in range(torch.cuda.device_count()))
    found = [resolve_device(name) for name in names.split(",")]
    if len({device.type for device in found}) > 1:
        raise ConfigError(f"--device {names}: give devices of one kind")
    if len({device.index or 0 for device in found}) < len(found):
        raise ConfigError(f"--device {names}: names a device twice")
    return found


def resolve_precision(name: str, device: torch.device) -> str:
    """ "auto" -> bf16 on a GPU that computes in it, else fp32. Raises ConfigError where the device lacks it."""
    if name == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if name == "tf32" and device.type != "cuda":
        raise ConfigError(f"--precision tf32: only NVIDIA GPUs have it, the device is {device.type}")
    return name


def has_float16(device: torch.device) -> bool:
    """Whether the hardware multiplies matrices in float16."""
    if device.type == "cpu":
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return device.type == "cuda"


@contextlib.contextmanager
def matmul_precision(precision: str, device: torch.device) -> Iterator[None]:
    """The precision of the products inside: "bf16" and "fp16" by autocast, "tf32", "fp32"; "fp8" is as bf16, as the
    layers that multiply in float8 do so themselves. Convolutions are products too, and give the same bits each time."""
    with _convolutions("tf32" if precision == "tf32" else "ieee"):
        if precision in ("bf16", "fp16", "fp8"):
            with torch.autocast(device.type, OPERAND.get(precision, torch.bfloat16)):
                yield
            return
        matmul = torch.backends.cuda.matmul
        before = matmul.fp32_precision
        matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        try:
            with torch.autocast(device.type, enabled=False):
                yield
        finally:
            matmul.fp32_precision = before


@contextlib.contextmanager
def _convolutions(precision: str) -> Iterator[None]:
    """The precision of float32 convolutions inside, which torch would make in TF32, and cuDNN's algorithms without
    atomic additions."""
    cudnn: Any = torch.backends.cudnn
    before, deterministic = cudnn.conv.fp32_precision, cudnn.deterministic
    cudnn.conv.fp32_precision, cudnn.deterministic = precision, True
    try:
        yield
    finally:
        cudnn.conv.fp32_precision, cudnn.deterministic = before, deterministic


@contextlib.contextmanager
def backward_precision(precision: str, device: torch.device) -> Iterator[None]:
    """As `matmul_precision`, for a backward: each product in the dtype of its operands, as the forward left them.
    Under autocast those of the two ends, which are float32, would be rounded to bf16."""
    with matmul_precision("tf32" if precision == "tf32" else "fp32", device):
        yield


def round_parameters(network: nn.Module, layers: Sequence[nn.Module], dtype: torch.dtype) -> list[Tensor | None]:
    """Give the parameters of `layers` another dtype, rounded to the nearest.

    Returns what they were, in the order of the network's parameters: the masters of an optimiser. None for a parameter
    that is in none of the layers.
    """
    masters: dict[nn.Parameter, Tensor] = {}
    for layer in layers:
        for name, parameter in list(layer.named_parameters(recurse=False)):
            rounded = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
            layer.register_parameter(name, rounded)
            masters[rounded] = parameter.detach()
    return [masters.get(parameter) for parameter in network.parameters()]
