"""Safetensors as LightningDiT's `extract_features.py` writes them (github.com/hustvl/LightningDiT).

`latents_rankRR_shardSSS.safetensors` hold `latents` and `latents_flip`, float32 [n, C, H, W] of one sample each, and
`labels`, int64 [n]; the data set is their sorted names. `latents_stats.pt` beside them holds `mean` and `std`,
[1, C, 1, 1], of all latents, and a model takes (x - mean) / std. RAE and VA-VAE shards are the same with other sizes.
"""

import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open

from ...errors import DataError
from ...files import TEXT, read_file
from ..dataset import Contents, Wanted
from ..latents.layout import SD_SCALE, Factor, damage
from .arrays import from_torch
from .files import Files
from .foreign import Sharded, layout_of

STATISTICS = "latents_stats.pt"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def recognises(place: Path) -> bool:
    """Whether a path is a folder with shards of the key `latents`, or one of them."""
    try:
        path = place / _names(place)[0] if place.is_dir() else place
        if not path.is_file():
            return False
        with safe_open(path, framework="pt") as file:
            return "latents" in file.keys()  # noqa: SIM118  # it is no dict
    except Exception:  # whatever it is, it is no shard; of a folder that can be told by the names alone
        return place.is_dir() and any(place.glob("latents*.safetensors"))


def _names(place: Path) -> list[str]:
    return sorted(path.name for path in place.glob("*.safetensors"))


def load(place: Path, wanted: Wanted) -> "SafetensorLatents":
    """The latents of all shards of a folder, or of one. Raises DataError."""
    return SafetensorLatents(place, wanted)


class Rows(NamedTuple):
    """Where the latents of a shard lie, or their twins."""

    start: int
    dtype: torch.dtype


class SafetensorLatents(Sharded):
    """Latents in safetensors shards one after the other.

    They are read at their positions: what is mapped of a file that is cut off would end the process.
    """

    def __init__(self, place: Path, wanted: Wanted) -> None:
        with damage(place, "the folder"):
            self._files = Files(place, _names(place)) if place.is_dir() else Files(place.parent, [place.name])
        self._rows: list[dict[str, Rows]] = []
        counts, labels = [], []
        shape: list[int] = []
        for number, name in enumerate(self._files.names):
            with damage(place, name), safe_open(self._files.path(number), framework="pt") as file:
                keys = set(file.keys())
                for key in ("latents", "labels"):
                    if key not in keys:
                        raise ValueError(f"holds no {key}")
                found = file.get_tensor("labels")
                slices = {key: file.get_slice(key) for key in sorted(keys & {"latents", "latents_flip"})}
                sizes = [part.get_shape() for part in slices.values()]
                shape = shape or sizes[0][1:]
                if any(size != [len(found), *shape] or len(size) != 4 for size in sizes) or not len(found):
                    raise ValueError(f"holds latents {sizes} for labels {list(found.shape)}, not {shape}")
                if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool or found.ndim != 1:
                    raise ValueError("its labels are no whole numbers")
                starts = _starts(self._files.path(number))
                self._rows.append({key: Rows(starts[key], _dtype(part.get_dtype())) for key, part in slices.items()})
                counts.append(len(found))
                labels.append(found.long())
        self._starts = np.cumsum([0, *counts])
        self._row_shape = shape
        scale, shift = _statistics(place, shape[0])
        contents = Contents("latents in safetensors")
        without = [name for name, rows in zip(self._files.names, self._rows, strict=True) if "latents_flip" not in rows]
        if without and len(without) < len(self._rows):
            contents.notes.append(f"flipped latents are not used: {without[0]} has none")
        layout = layout_of(shape, False, scale, shift)
        super().__init__(place, layout, torch.cat(labels), contents, wanted, mirrors=not without)

    def row(self, number: int, mirrored: bool) -> np.ndarray:
        file = self.file(number)
        start, dtype = self._rows[file]["latents_flip" if mirrored else "latents"]
        length = int(np.prod(self._row_shape)) * dtype.itemsize
        handle = os.open(self._files.path(file), os.O_RDONLY)
        try:
            content = bytearray(os.pread(handle, length, start + self._row_of(number) * length))
        finally:
            os.close(handle)
        if len(content) < length:
            raise ValueError(f"has {len(content)} bytes of {length}")
        return torch.frombuffer(content, dtype=dtype).view(self._row_shape).float().numpy()


def _starts(path: Path) -> dict[str, int]:
    """Where the tensors of a shard begin, whose header safetensors has checked."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {key: 8 + length + entry["data_offsets"][0] for key, entry in header.items() if key != "__metadata__"}


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"holds latents in {name}")
    return DTYPES[name]


def _statistics(place: Path, channels: int) -> tuple[Factor, Factor]:
    """Scale and shift of each channel: 1 / std and mean. Raises DataError."""
    path = (place if place.is_dir() else place.parent) / STATISTICS
    if not path.exists():
        if channels == 4:
            return SD_SCALE, 0.0
        raise DataError(f"--data {place}: {STATISTICS} is missing: its mean and std scale the channels")
    with damage(place, STATISTICS):
        values = from_torch(read_file(path, TEXT, follow=True))
        mean, std = (values[name].flatten() for name in ("mean", "std"))
        if mean.is_complex() or std.is_complex():
            raise ValueError("its numbers are complex")
        mean, std = mean.double(), std.double()
        if len(mean) != channels or len(std) != channels:
            raise ValueError(f"is of {len(mean)} channels, the latents of {channels}")
        if not all(torch.isfinite(part.half()).all() for part in (mean, std, 1 / std)) or (std <= 0).any():
            raise ValueError("its numbers make no sense")  # of latents that float16 holds
    return tuple((1 / std).tolist()), tuple(mean.tolist())
