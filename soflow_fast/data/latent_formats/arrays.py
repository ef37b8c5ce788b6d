"""Numbers of what files hold: .npy and torch.save in memory, latents with a log-variance, labels."""

import ast
import io
import math
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

LOGVAR = (-30.0, 20.0)
"""To what a log-variance is clipped, as in diffusers' and latent-diffusion's DiagonalGaussianDistribution."""


def with_std(moments: np.ndarray) -> np.ndarray:
    """mean || std of mean || log-variance, [2C, H, W]. Raises ValueError."""
    if len(moments) % 2:
        raise ValueError(f"holds {len(moments)} channels, no mean || log-variance")
    mean, logvar = np.split(moments, 2)
    return np.concatenate([mean, std_of(logvar)])


def std_of(logvar: np.ndarray) -> np.ndarray:
    """exp(logvar / 2), in float64: in float16 it is then the same on every processor."""
    return np.exp(0.5 * logvar.astype(np.float64).clip(*LOGVAR))


def three_axes(row: np.ndarray) -> np.ndarray:
    """[2C, H, W] of it with any number of axes of length 1 before. Raises ValueError."""
    while row.ndim > 3 and row.shape[0] == 1:
        row = row[0]
    if row.ndim != 3 or row.dtype.kind != "f":
        raise ValueError(f"holds {row.dtype} {row.shape}, no latent [C, H, W]")
    return row


def from_npy(content: bytes) -> np.ndarray:
    """The array of a .npy file, whose length must be what its header says. Raises ValueError."""
    if content[:6] != b"\x93NUMPY" or len(content) < 12:
        raise ValueError("is no .npy file")
    wide = content[6] > 1
    start = 12 if wide else 10
    stop = start + int.from_bytes(content[8:start], "little")
    try:
        header = ast.literal_eval(content[start : min(stop, 10_000)].decode("latin1"))
        dtype, shape, fortran = np.dtype(header["descr"]), header["shape"], header["fortran_order"]
        right = dtype.kind in "fiu" and all(type(size) is int and size >= 0 for size in shape)
    except (SyntaxError, ValueError, TypeError, KeyError, MemoryError, RecursionError):
        raise ValueError("has a damaged .npy header") from None
    if not right or len(content) - stop != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"has {len(content)} bytes, which is not {dtype} {shape}")
    return np.frombuffer(content, dtype, offset=stop).reshape(shape, order="F" if fortran else "C")


def from_torch(content: bytes) -> Any:
    """What a file of torch.save holds, on the CPU: tensors, numpy's arrays, and what is plain. Raises what torch does.

    ValueError, if it would run something.
    """
    try:
        with torch.serialization.safe_globals(_arrays()):
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        if type(error).__name__ != "UnpicklingError":  # whose text advises to run it
            raise
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"calls {found[1][:60]}, which is not run" if found else "is damaged, or holds more than numbers"
        raise ValueError(what) from None


def _arrays() -> list[Any]:
    """What torch's restricted reader must know to read numpy's arrays, by the names of numpy 1 and 2."""
    make = np.zeros(0).__reduce__()[0]
    names: list[Any] = [(make, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    return [*names, np.ndarray, np.dtype, *(type(np.dtype(code)) for code in ("f2", "f4", "f8", "i4", "i8"))]


def whole_number(value: Any) -> int:
    """A label: an int, or an array or tensor of one whole number. Raises ValueError for all else."""
    if type(value) is int:
        return value
    if isinstance(value, torch.Tensor):
        value = value.numpy(force=True)
    if isinstance(value, np.ndarray | np.integer) and value.size == 1 and value.dtype.kind in "iu":
        return int(value.reshape(()))
    raise ValueError(f"has the label {str(value)[:40]!r}, which is no whole number")


def numbered(labels: Iterable[int]) -> Tensor:
    """Labels as int64 [n]. Raises ValueError if they are no whole numbers."""
    values = list(labels)
    if not all(type(value) is int and -(2**62) < value < 2**62 for value in values):
        raise ValueError("has labels that are no whole numbers")
    return torch.tensor(values, dtype=torch.int64)
