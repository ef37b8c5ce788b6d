"""What the choices that are made by time share: the clock's median, the error that is allowed, and where a choice is
kept."""

import json
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..files import write_file
from ..version import __version__
from .attention import in_short, version

Time = TypeVar("Time")

WARM_UP = 3
SAMPLES = 9
CALLS = 5
"""Calls in each sample of the time, so that launching one kernel hides behind the one before, as it does in a step."""


def median_seconds(work: Callable[[], Any], clock: Callable[[], float], device: torch.device) -> float:
    """The median time of a call of `work`; `clock` gives seconds."""
    for _ in range(WARM_UP):
        work()
    times = []
    for _ in range(SAMPLES):
        _synchronize(device)
        began = clock()
        for _ in range(CALLS):
            work()
        _synchronize(device)
        times.append((clock() - began) / CALLS)
    return sorted(times)[SAMPLES // 2]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def tried(
    names: Iterable[str], fault: Callable[[str], str | None], seconds: Callable[[str], Time]
) -> tuple[dict[str, Time], dict[str, str]]:
    """What each of several takes, and why the others were passed over.

    fault: says why one must not be used, None: it may; seconds: its time, or it raises.
    """
    times: dict[str, Time] = {}
    passed_over: dict[str, str] = {}
    for name in names:
        reason = fault(name)
        if reason is None:
            try:
                times[name] = seconds(name)
            except Exception as error:  # memory, say
                reason = in_short(error)
        if reason is not None:
            passed_over[name] = reason
    return times, passed_over


def forget_memory(device: torch.device) -> None:
    """Give back what was tried out, which is no part of the run's memory."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def rounding_unit(device: torch.device, dtype: torch.dtype) -> float:
    """The distance of 1 from the next number in the precision of matrix products.

    Operands, weights and results are rounded to at most half of it each, and independently over rows: measured are
    errors of up to 0.4 of it in bf16, of a gradient. Where sums are not wider than their terms, they round as well: in
    float32 errors of up to 4 units of the last place are measured, hence 16.
    """
    if dtype in (torch.float32, torch.float64):
        return 2.0**-10 if in_tf32(device, dtype) else 16 * torch.finfo(dtype).eps
    return torch.finfo(dtype).eps


def in_tf32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of a dtype are in TF32."""
    tf32 = dtype == torch.float32 and device.type == "cuda"
    return tf32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def setting(device: torch.device, dtype: torch.dtype, packages: Iterable[str]) -> str:
    """Everything that a choice depends on beside the shape: the GPU, versions and the precision of products."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = [f"{package} {version(package)}" for package in packages]
    precision = "tf32" if in_tf32(device, dtype) else str(dtype).removeprefix("torch.")
    torches = f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    return "; ".join([gpu, f"soflow-fast {__version__}", torches, *versions, precision])


def read_choices(path: Path) -> dict[str, Any]:
    """The choices that a file holds; none, if it cannot be read."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def write_choices(path: Path, values: dict[str, Any]) -> None:
    """Put choices into a file, if it can be written; else the next start measures again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, (json.dumps(values, indent=2) + "\n").encode(), synced=False)
    except OSError:
        pass
