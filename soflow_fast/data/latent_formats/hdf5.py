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
from .files import Files, starts_with
from .foreign import Sharded, layout_of

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
    with damage(place, "the folder" if place.is_dir() else place.name):
        files = Files(place, _names(place)) if place.is_dir() else Files(place.parent, [place.name])
    return Hdf5Latents(place, files, wanted)


def _names(place: Path) -> list[str]:
    names = os.listdir(place)
    parts = sorted((int(found[1]), found[0]) for found in map(PART.fullmatch, names) if found)
    if MERGED in names:
        if parts:
            raise DataError(f"--data {place}: {parts[0][1]} lies beside {MERGED}: the merge was not finished")
        return [MERGED]
    for place_of, (number, name) in enumerate(parts):
        if number > place_of:
            raise DataError(f"--data {place}: imagenet_latent_part_{place_of}.hdf5 is missing")
        if number < place_of:
            raise DataError(f"--data {place}: {parts[place_of - 1][1]} and {name} are the same part")
    return [name for _, name in parts]


class Hdf5Latents(Sharded):
    """Latents in HDF5 files one after the other. Each process opens them for itself: h5py does not survive a fork."""

    def __init__(self, place: Path, files: Files, wanted: Wanted) -> None:
        self._files = files
        self._opened: tuple[int, list[Any]] = (0, [])
        counts, labels, shape = [], [], None
        for number, name in enumerate(files.names):
            with damage(place, name):
                latents, found = _datasets(files.path(number))
                if shape not in (None, latents.shape[1:]):
                    raise ValueError(f"latents are {latents.shape[1:]}, those of {files.names[0]} {shape}")
                if not np.any(latents[-1]):
                    raise ValueError("its last latent is all 0: the encoding was not finished")
                shape = latents.shape[1:]
                counts.append(len(latents))
                labels.append(torch.from_numpy(np.asarray(found[:], np.int64)))
                latents.file.close()
        self._starts = np.cumsum([0, *counts])
        assert shape is not None
        layout = layout_of(shape, std=True)
        super().__init__(place, layout, torch.cat(labels), Contents("latents in HDF5"), wanted, mirrors=False)

    def row(self, number: int, mirrored: bool) -> np.ndarray:
        if self._opened[0] != os.getpid():
            self._opened = os.getpid(), [_datasets(self._files.path(i))[0] for i in range(len(self._files))]
        return self._opened[1][self.file(number)][self._row_of(number)]

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"_opened": (0, [])}


def _datasets(path: Path) -> tuple[Any, Any]:
    """`latents` and `labels` of a file that stays open. Raises OSError, KeyError and ValueError."""
    import h5py  # pyright: ignore[reportMissingImports]

    file: Any = h5py.File(path, "r")
    found: list[Any] = []
    for name, kinds in (("latents", "f"), ("labels", "iu"), ("amount", "fiu"), ("latent_size", "fiu")):
        link = file.get(name, getlink=True)
        if link is None and name in ("amount", "latent_size"):
            found.append(None)
            continue
        if not isinstance(link, h5py.HardLink):  # another link leads to another file
            raise ValueError(f"holds no {name}")
        data = file[name]
        if not isinstance(data, h5py.Dataset) or data.external or data.is_virtual or data.dtype.kind not in kinds:
            raise ValueError(f"{name} are no numbers of this file")
        found.append(data)
    latents, labels, *said = found
    if latents.ndim != 4 or not len(latents) or latents.shape[1] % 2:
        raise ValueError(f"latents are {latents.shape}, not [N, 2C, S, S]")
    if labels.shape != latents.shape[:1]:
        raise ValueError(f"has {labels.shape} labels for {len(latents)} latents")
    for data, size in zip(said, (len(latents), latents.shape[3]), strict=True):
        if data is not None and (data.shape or data[()] != size):
            raise ValueError(f"says {data.name[1:]} {data.shape or data[()]}, its latents {size}")
    return latents, labels
