"""Safetensors as LightningDiT's `extract_features.py` writes them (github.com/hustvl/LightningDiT).

`latents_rankRR_shardSSS.safetensors` hold `latents` and `latents_flip`, float32 [n, C, H, W] of one sample each, and
`labels`, int64 [n]; the data set is their sorted names. `latents_stats.pt` beside them holds `mean` and `std`,
[1, C, 1, 1], of all latents, and a model takes (x - mean) / std. RAE and VA-VAE shards are the same with other sizes.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from ...errors import DataError
from ...files import TEXT, read_file
from ..dataset import Contents, Wanted
from ..latents.layout import SD_SCALE, Factor, damage
from .foreign import Foreign, checksum_of, layout_of

STATISTICS = "latents_stats.pt"


def recognises(place: Path) -> bool:
    """Whether a path is a folder with shards of the keys `latents` and `labels`, or one of them."""
    try:
        path = _paths(place)[0]
        if not path.is_file():
            return False
        with safe_open(path, framework="pt") as file:
            return {"latents", "labels"} <= set(file.keys())
    except Exception:  # whatever it is, it is no shard; of a folder that can be told by the names alone
        return place.is_dir() and any(place.glob("latents*.safetensors"))


def _paths(place: Path) -> list[Path]:
    return sorted(place.glob("*.safetensors")) if place.is_dir() else [place]


def load(place: Path, wanted: Wanted) -> "SafetensorLatents":
    """The latents of all shards of a folder, or of one. Raises DataError."""
    return SafetensorLatents(place, wanted)


class SafetensorLatents(Foreign):
    """Latents in safetensors shards one after the other."""

    def __init__(self, place: Path, wanted: Wanted) -> None:
        self._paths = _paths(place)
        self._opened: dict[Path, Any] = {}
        counts, labels, mirrors = [], [], True
        shape: list[int] = []
        for path in self._paths:
            with damage(place, path.name), safe_open(path, framework="pt") as file:
                keys = set(file.keys())
                for name in ("latents", "labels"):
                    if name not in keys:
                        raise ValueError(f"holds no {name}")
                found = file.get_tensor("labels")
                sizes = [file.get_slice(name).get_shape() for name in sorted(keys & {"latents", "latents_flip"})]
                mirrors &= len(sizes) == 2
                shape = shape or sizes[0][1:]
                if any(size != [len(found), *shape] or len(size) != 4 for size in sizes) or not len(found):
                    raise ValueError(f"holds latents {sizes} for labels {list(found.shape)}, not {shape}")
                if found.is_floating_point() or found.ndim != 1:
                    raise ValueError("its labels are no whole numbers")
                counts.append(len(found))
                labels.append(found.long())
        self._starts = np.cumsum([0, *counts])
        scale, shift = _statistics(place, shape[0])
        contents = Contents("latents in safetensors")
        layout = layout_of(shape, False, scale, shift)
        super().__init__(place, layout, torch.cat(labels), contents, wanted, mirrors=mirrors)
        contents.checksum = checksum_of([(path.name, path.stat().st_size) for path in self._paths], self.labels)

    def row(self, number: int, mirrored: bool) -> np.ndarray:
        file = int(np.searchsorted(self._starts, number, side="right")) - 1
        path = self._paths[file]
        if path not in self._opened:
            self._opened[path] = safe_open(path, framework="pt")
        rows = self._opened[path].get_slice("latents_flip" if mirrored else "latents")
        at = int(number - self._starts[file])
        return rows[at : at + 1][0].float().numpy()

    def name(self, number: int) -> str:
        file = int(np.searchsorted(self._starts, number, side="right")) - 1
        return f"{self._paths[file].name}, latent {number - self._starts[file]},"

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"_opened": {}}


def _statistics(place: Path, channels: int) -> tuple[Factor, Factor]:
    """Scale and shift of each channel: 1 / std and mean. Raises DataError."""
    path = (place if place.is_dir() else place.parent) / STATISTICS
    if not path.exists():
        if channels == 4:
            return SD_SCALE, 0.0
        raise DataError(f"--data {place}: {STATISTICS} is missing: its mean and std scale the channels")
    with damage(place, STATISTICS):
        values = torch.load(io.BytesIO(read_file(path, TEXT, follow=True)), map_location="cpu", weights_only=True)
        mean, std = (values[name].double().flatten() for name in ("mean", "std"))
        if len(mean) != channels or len(std) != channels:
            raise ValueError(f"is of {len(mean)} channels, the latents of {channels}")
        if not torch.isfinite(mean).all() or not torch.isfinite(1 / std).all() or (std <= 0).any():
            raise ValueError("its numbers make no sense")
    return tuple((1 / std).tolist()), tuple(mean.tolist())
