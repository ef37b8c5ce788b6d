"""`--env`: versions, devices, and which kernels and attention are in use and why others are not."""

import importlib.metadata
import platform

import torch

from . import attention
from .state import resolve_device, resolve_precision
from .version import __version__

PACKAGES = ("torch", "triton", "numpy", "scikit-learn", "safetensors", "flash-attn", "xformers", "apex", "diffusers")


def report(device_name: str = "auto") -> str:
    """The text that `--env` prints. Raises ConfigError for a device that is not there."""
    device = resolve_device(device_name)
    rows = [("soflow-fast", __version__), ("python", f"{platform.python_version()} on {platform.platform()}")]
    rows += [(name, _version(name)) for name in PACKAGES]
    rows.append(("CPU threads", str(torch.get_num_threads())))
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        capability = f"sm_{card.major}{card.minor}"
        rows.append(
            (f"cuda:{i}", f"{card.name}, {card.total_memory / 2**30:.0f} GiB, {capability}, CUDA {torch.version.cuda}")
        )
    rows.append(("device", f"{device}, precision {resolve_precision('auto', device)}"))
    lines = [f"{name:<14} {value}" for name, value in rows]
    lines += ["", "attention"]
    lines += [f"  {name:<12} {'in use' if used else 'off':<7} {why}" for name, used, why in attention.status()]
    lines += ["", "kernels"]
    lines += [f"  {line}" for line in _kernels(device)]
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _kernels(device: torch.device) -> list[str]:
    import soflow_kernels

    return [
        f"{name:<36} {'kernel' if on else 'reference':<10} {why}" for name, (on, why) in soflow_kernels.status().items()
    ]
