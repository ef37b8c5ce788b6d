"""HDF5 as the SoFlow authors' `latent_dataset.py` writes it (github.com/zlab-princeton/SoFlow).

`imagenet_latent.hdf5` holds `latents`, float32 [N, 8, S, S] of mean || std, unscaled, `labels`, int64 [N], and the
numbers `amount` (N) and `latent_size` (S). Before they are merged, rank R of W writes `imagenet_latent_part_R.hdf5`
with `latents` and `labels` of its contiguous part; all parts in the order of R are the same data.
"""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import DataError
from ..dataset import Contents, Wanted
from ..latents.layout import damage
from .foreign import Foreign, checksum_of, layout_of, starts_with

MAGIC = b"\x89HDF\r\n\x1a\n"
MERGED = "imagenet_latent.hdf5"
PART = re.compile(r"imagenet_latent_part_(\d{1,5})\.hdf5")


def recognises(place: Path) -> bool:
    """Whether a path is an HDF5 file, or a folder with the authors' files."""
    try:
        if place.is_dir():
            return any(name == MERGED or PART.fullmatch(name) for name in os.listdir(place))
    except (OSError, ValueError):
        return False
    return starts_with(place, MAGIC)


def load(place: Path, wanted: Wanted) -> "Hdf5Latents":
    """The latents of a file, or of a folder with the merged file or all parts. Raises DataError."""
    try:
        import h5py  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise DataError(f"--data {place}: HDF5 needs h5py: pip install 'soflow-fast[latents]'") from None
    return Hdf5Latents(place, _files(place), wanted)


def _files(place: Path) -> list[Path]:
    if not place.is_dir():
        return [place]
    with damage(place, "the folder"):
        names = os.listdir(place)
    parts = sorted(int(found[1]) for found in map(PART.fullmatch, names) if found)
    if MERGED in names:
        if parts:
            left = f"imagenet_latent_part_{parts[0]}.hdf5"
            raise DataError(f"--data {place}: {left} lies beside {MERGED}: the merge was not finished")
        return [place / MERGED]
    missing = sorted(set(range(parts[-1] + 1)) - set(parts))
    if missing:
        raise DataError(f"--data {place}: imagenet_latent_part_{missing[0]}.hdf5 is missing")
    return [place / f"imagenet_latent_part_{number}.hdf5" for number in parts]


class Hdf5Latents(Foreign):
    """Latents in HDF5 files one after the other. Each process opens them for itself: h5py does not survive a fork."""

    def __init__(self, place: Path, paths: list[Path], wanted: Wanted) -> None:
        self._paths = paths
        self._opened: tuple[int, list[Any]] = (0, [])
        counts, labels, shape = [], [], None
        for path in paths:
            with damage(place, path.name):
                latents, found = _datasets(path)
                if shape not in (None, latents.shape[1:]):
                    raise ValueError(f"latents are {latents.shape[1:]}, those of {paths[0].name} {shape}")
                if not np.any(latents[-1]):
                    raise ValueError("its last latent is all 0: the encoding was not finished")
                shape = latents.shape[1:]
                counts.append(len(latents))
                labels.append(torch.from_numpy(np.asarray(found[:], np.int64)))
                latents.file.close()
        self._starts = np.cumsum([0, *counts])
        assert shape is not None
        layout = layout_of(shape, std=True)
        contents = Contents("latents in HDF5")
        super().__init__(place, layout, torch.cat(labels), contents, wanted, mirrors=False)
        sizes = [(path.name, path.stat().st_size) for path in paths]
        contents.checksum = checksum_of(sizes, self.labels)

    def row(self, number: int, mirrored: bool) -> np.ndarray:
        if self._opened[0] != os.getpid():
            self._opened = os.getpid(), [_datasets(path)[0] for path in self._paths]
        file = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._opened[1][file][number - self._starts[file]]

    def name(self, number: int) -> str:
        file = int(np.searchsorted(self._starts, number, side="right")) - 1
        return f"{self._paths[file].name}, latent {number - self._starts[file]},"

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"_opened": (0, [])}


def _datasets(path: Path) -> tuple[Any, Any]:
    """`latents` and `labels` of a file that stays open. Raises OSError, KeyError and ValueError."""
    import h5py  # pyright: ignore[reportMissingImports]

    file: Any = h5py.File(path, "r")
    found: list[Any] = []
    for name, kinds in (("latents", "f"), ("labels", "iu")):
        if not isinstance(file.get(name, getlink=True), h5py.HardLink):  # another link leads to another file
            raise ValueError(f"holds no {name}")
        data = file[name]
        if not isinstance(data, h5py.Dataset) or data.external or data.is_virtual or data.dtype.kind not in kinds:
            raise ValueError(f"{name} are no numbers of this file")
        found.append(data)
    latents, labels = found
    if latents.ndim != 4 or not len(latents) or latents.shape[1] % 2:
        raise ValueError(f"latents are {latents.shape}, not [N, 2C, S, S]")
    if labels.shape != latents.shape[:1]:
        raise ValueError(f"has {labels.shape} labels for {len(latents)} latents")
    for name, size in (("amount", len(latents)), ("latent_size", latents.shape[3])):
        said = file[name][()] if name in file else size
        if np.shape(said) or int(said) != size:
            raise ValueError(f"says {name} {said}, its latents {size}")
    return latents, labels
