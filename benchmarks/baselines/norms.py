"""Other people's layer norms, as they take part in the race of operations where they are installed."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

EPS = 1e-6

Way = TypeVar("Way")
Found = dict[str, Way | str]
"""By name: what somebody else's package offers, or why it is not here."""
Norm = Callable[[Tensor], Tensor]


def found(device: torch.device, packages: dict[str, tuple[str, str, str, Callable[[Any], Way]]]) -> Found[Way]:
    """What packages offer on a device. packages: by name, the package that must be installed, the module to import,
    what users install, and what makes the way of the module."""
    ways: Found[Way] = {}
    for name, (package, module, title, make) in packages.items():
        if importlib.util.find_spec(package) is None:
            ways[name] = f"{title} is not installed"
        elif device.type != "cuda":
            ways[name] = f"{title} needs a GPU"
        else:
            try:
                imported = importlib.import_module(module)
            except (ImportError, AttributeError, OSError) as error:
                ways[name] = f"{title} cannot be imported: {' '.join(str(error).split())}"
                continue
            try:
                ways[name] = make(imported)
            except AttributeError as error:
                ways[name] = f"this version of {title} has no such thing: {error}"
    return ways


def norms(device: torch.device) -> Found[Norm]:
    """Other people's layer norms as functions of x [B, T, D], or why they are not here."""
    engine = "transformer_engine.pytorch"
    return found(
        device,
        {
            "Liger": ("liger_kernel", "liger_kernel.transformers.functional", "liger-kernel", _liger),
            "apex": ("apex", "apex.normalization.fused_layer_norm", "apex", _apex),
            "flash-attn": ("flash_attn", "flash_attn.ops.triton.layer_norm", "flash-attn", _flash),
            "TransformerEngine": ("transformer_engine", engine, "transformer-engine", _transformer_engine),
        },
    )


def modulated(norm: Norm, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`layernorm_modulate` with another norm; the modulation is eager."""
    return torch.addcmul(shift.unsqueeze(1), norm(x), 1 + scale.unsqueeze(1))


def gated_residual_norm(norm: Norm, x, y, gate, shift, scale, bias) -> tuple[Tensor, Tensor]:
    """`gate_residual_layernorm_modulate` with another norm."""
    x = torch.addcmul(x, gate.unsqueeze(1), y + bias)
    return x, modulated(norm, x, shift, scale)


def _affine(norm: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Norm:
    """A norm that asks for a weight and a bias, as one of x: ones and zeros are made at the first call of a width."""
    made: dict[tuple, tuple[Tensor, Tensor]] = {}

    def plain(x: Tensor) -> Tensor:
        key = x.shape[-1], x.dtype, x.device
        if key not in made:
            made[key] = x.new_ones(x.shape[-1]), x.new_zeros(x.shape[-1])
        return norm(x, *made[key])

    return plain


def _liger(module: Any) -> Norm:
    return _affine(lambda x, weight, bias: module.liger_layer_norm(x, weight, bias, EPS))


def _apex(module: Any) -> Norm:
    return lambda x: module.fused_layer_norm(x, (x.shape[-1],), EPS)


def _transformer_engine(module: Any) -> Norm:
    made: dict[tuple, Any] = {}
    make = module.LayerNorm

    def plain(x: Tensor) -> Tensor:
        key = x.shape[-1], x.dtype, x.device
        if key not in made:  # ones and zeros, which learn nothing here
            made[key] = make(x.shape[-1], eps=EPS, dtype=x.dtype, device=x.device).requires_grad_(False)
        return made[key](x)

    return plain


def _flash(module: Any) -> Norm:
    return _affine(lambda x, weight, bias: module.layer_norm_fn(x, weight, bias, eps=EPS))
