"""Other people's layer norms, as they take part in the race of operations where they are installed."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

EPS = 1e-6


def norms(device: torch.device) -> dict[str, Callable[[Tensor], Tensor] | str]:
    """Other people's layer norms as functions of x [B, T, D], or why they are not here."""
    packages = {
        "Liger": ("liger_kernel", "liger_kernel.transformers.functional", "liger-kernel", _liger),
        "apex": ("apex", "apex.normalization.fused_layer_norm", "apex", _apex),
        "flash-attn": ("flash_attn", "flash_attn.ops.triton.layer_norm", "flash-attn", _flash),
    }
    found: dict[str, Callable[[Tensor], Tensor] | str] = {}
    for name, (package, module, title, make) in packages.items():
        if importlib.util.find_spec(package) is None:
            found[name] = f"{title} is not installed"
        elif device.type != "cuda":
            found[name] = f"{title} needs a GPU"
        else:
            try:
                found[name] = make(importlib.import_module(module))
            except (ImportError, AttributeError) as error:
                found[name] = f"{title} cannot be imported: {' '.join(str(error).split())}"
    return found


def modulated(norm: Callable[[Tensor], Tensor], x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`layernorm_modulate` with another norm; the modulation is eager."""
    return torch.addcmul(shift.unsqueeze(1), norm(x), 1 + scale.unsqueeze(1))


def gated_residual_norm(norm: Callable[[Tensor], Tensor], x, y, gate, shift, scale, bias) -> tuple[Tensor, Tensor]:
    """`gate_residual_layernorm_modulate` with another norm."""
    x = torch.addcmul(x, gate.unsqueeze(1), y + bias)
    return x, modulated(norm, x, shift, scale)


def _affine(norm: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A norm that asks for a weight and a bias, as one of x: ones and zeros are made at the first call of a width."""
    made: dict[tuple, tuple[Tensor, Tensor]] = {}

    def plain(x: Tensor) -> Tensor:
        key = x.shape[-1], x.dtype, x.device
        if key not in made:
            made[key] = x.new_ones(x.shape[-1]), x.new_zeros(x.shape[-1])
        return norm(x, *made[key])

    return plain


def _liger(module: Any) -> Callable[[Tensor], Tensor]:
    return _affine(lambda x, weight, bias: module.liger_layer_norm(x, weight, bias, EPS))


def _apex(module: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: module.fused_layer_norm(x, (x.shape[-1],), EPS)


def _flash(module: Any) -> Callable[[Tensor], Tensor]:
    return _affine(lambda x, weight, bias: module.layer_norm_fn(x, weight, bias, eps=EPS))
