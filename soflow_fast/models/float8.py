"""Products of the blocks in float8, by torchao's training recipe: tensor-wise dynamic scales, e4m3 values and weights,
e5m2 gradients (Micikevicius et al. 2022, arXiv 2209.05433). For Hopper, Ada and later; everything else stays bf16."""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..config.schema import DiTConfig
from ..errors import ConfigError

MULTIPLE = 16
"""Of every side of a float8 product."""

_on = False


def require(model: DiTConfig, device: torch.device) -> None:
    """Raise ConfigError where --precision fp8 cannot be had."""
    tokens = (model.input_size // model.patch_size) ** 2
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError("--precision fp8: torchao is not installed (pip install torchao)")
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError("--precision fp8: needs an NVIDIA GPU of compute capability 8.9 or more")
    for name, value in (("model.hidden_size", model.hidden_size), ("tokens", tokens)):
        if value % MULTIPLE:
            raise ConfigError(f"--precision fp8: {name} must be a multiple of {MULTIPLE}, got {value}")


def use_float8(layers: list[nn.Linear], *, emulate: bool = False) -> None:
    """Let these layers multiply in float8 inside `float8_products`. They keep their parameters and their keys."""
    from torchao.float8 import Float8LinearConfig  # pyright: ignore[reportMissingImports]
    from torchao.float8.float8_linear import Float8Linear  # pyright: ignore[reportMissingImports]

    for layer in layers:
        twin: Any = Float8Linear.from_float(layer, config=Float8LinearConfig(emulate=emulate))
        twin.bias = None  # goes where the other products' biases go
        layer.__dict__["float8"] = twin  # past nn.Module, which would list its parameters twice


@contextlib.contextmanager
def float8_products() -> Iterator[None]:
    """Within the context, layers of `use_float8` multiply in float8."""
    global _on
    before, _on = _on, True
    try:
        yield
    finally:
        _on = before


def product(layer: nn.Linear) -> Callable[[Tensor], Tensor] | None:
    """How the layer multiplies here, without its bias, if that is in float8."""
    twin: Any = layer.__dict__.get("float8") if _on else None
    if twin is not None and twin.weight is not layer.weight:
        twin.weight = layer.weight
    return twin
