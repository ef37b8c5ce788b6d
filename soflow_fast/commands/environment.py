"""`--env`: versions, devices, and which kernels, attention backends and products are in use and why others are not."""

import platform

import torch

import soflow_kernels

from ..models import attention, mlp_products
from ..training.precision import resolve_device, resolve_precision
from ..version import __version__

PACKAGES = (
    *("torch", "triton", "numpy", "scikit-learn", "safetensors"),
    *("flash-attn", "flash_attn_3", "flash-attn-4", "xformers", "quack-kernels", "apex", "diffusers"),
)
HEAD_DIM = 64
"""Head dimension in the table of attention backends. Only DiT-XL has another, 72, whose needs are the same."""


def report(device_name: str = "auto") -> str:
    """The text that `--env` prints. Raises ConfigError for a device that is not there."""
    device = resolve_device(device_name)
    rows = [("soflow-fast", __version__), ("python", f"{platform.python_version()} on {platform.platform()}")]
    rows += [(name, attention.version(name) or "not installed") for name in PACKAGES]
    rows.append(("CPU threads", str(torch.get_num_threads())))
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        capability = f"sm_{card.major}{card.minor}"
        rows.append(
            (f"cuda:{i}", f"{card.name}, {card.total_memory / 2**30:.0f} GiB, {capability}, CUDA {torch.version.cuda}")
        )
    precision = resolve_precision("auto", device)
    rows.append(("device", f"{device}, precision {precision}"))
    lines = [f"{name:<14} {value}" for name, value in rows]
    lines += ["", "attention"]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    table = attention.status(device, dtype, HEAD_DIM)
    lines += [f"  {name:<14} {'usable' if usable else 'off':<7} {why}" for name, usable, why in table]
    lines += ["", "MLP"]
    reason = mlp_products.why_not(device, dtype)
    table = [
        ("kernels", True, "products of torch, the GELU after them"),
        ("quack", reason is None, reason or "products of quack-kernels, the GELU in them"),
    ]
    lines += [f"  {name:<14} {'usable' if usable else 'off':<7} {why}" for name, usable, why in table]
    lines += ["", "kernels"]
    operations = soflow_kernels.status().items()
    lines += [f"  {name:<36} {'kernel' if on else 'reference':<10} {why}" for name, (on, why) in operations]
    return "\n".join(lines)
