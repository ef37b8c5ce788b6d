"""Scaled dot-product attention, and what this machine has of it."""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k' / sqrt(head_dim)) v for q, k, v [B, heads, T, head_dim]; torch picks its fastest kernel."""
    return F.scaled_dot_product_attention(q, k, v)


def flop_counter() -> FlopCounterMode:
    """torch's FLOP counter, taught the CPU's flash kernel, of which it would count nothing."""
    aten = torch.ops.aten
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *rest, **named: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda grad, q, k, v, *rest, **named: sdpa_backward_flop_count(grad, q, k, v)
        ),
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)


def status() -> list[tuple[str, bool, str]]:
    """(backend, in use, why) for every attention implementation that the engine knows of."""
    if torch.cuda.is_available():
        flash, efficient, cudnn = (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.cudnn_sdp_enabled(),
        )
        names = [n for n, on in (("flash", flash), ("memory-efficient", efficient), ("cuDNN", cudnn)) if on]
        rows = [("torch SDPA", True, f"picks among {', '.join([*names, 'math'])} by shape and dtype")]
    else:
        rows = [("torch SDPA", True, "CPU flash kernel")]
    for package, module in (("flash-attn", "flash_attn"), ("xformers", "xformers")):
        installed = importlib.util.find_spec(module) is not None
        rows.append(
            (package, False, "installed, not used: torch SDPA serves every shape" if installed else "not installed")
        )
    return rows
