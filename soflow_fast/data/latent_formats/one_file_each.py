"""CLASS/NAME.npz or CLASS/NAME.pt per image.

.npz as MAR's `main_cache.py` writes (github.com/LTH14/mar): `moments` and `moments_flip`, [2C, S, S] of
mean || log-variance, unscaled. .pt as ports of it write with torch.save: a dict of the same names, tensors or arrays;
or `latent` (or `latents`, `mean`) with `std` or without, or a tensor alone; a `label` in the dict goes before the
folder. A tensor that is not of `moments` is mean || std, or a sample that is scaled already.
"""

import io
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from ...errors import DataError
from ...files import read_file
from ..dataset import Contents, Wanted, by_name
from ..latents.layout import damage
from .foreign import (
    LARGEST_FILE,
    Foreign,
    checksum_of,
    files_below,
    from_npy,
    has_std,
    layout_of,
    numbered,
    said_of,
    three_axes,
    with_std,
)

SUFFIXES = (".pt", ".npz")
NOT_LATENTS = ("latents_stats.pt", "latent_stats.pt", "label_cluster.pt")
LATENT = ("latent", "latents", "mean")


def recognises(place: Path) -> bool:
    """Whether a path is a folder with .pt files, or with folders of .npz files that hold moments."""
    try:
        found = _files(place, 2000) if place.is_dir() else []
        if not found:
            return False
        first = found[0][0]
        if first.endswith(".pt"):
            return True
        with zipfile.ZipFile(place / first) as archive:
            return "moments.npy" in archive.namelist()
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile):
        return False


def _files(place: Path, most: int | None = None) -> list[tuple[str, int]]:
    found = files_below(place, SUFFIXES, most)
    return [item for item in found if PurePosixPath(item[0]).name not in NOT_LATENTS]


def load(place: Path, wanted: Wanted) -> "SingleLatents":
    """The latents of a folder. Raises DataError."""
    return SingleLatents(place, wanted)


class SingleLatents(Foreign):
    """Latents in a file each, whose folder is their class."""

    def __init__(self, place: Path, wanted: Wanted) -> None:
        self.place = place
        with damage(place, "the folder"):
            self._files = _files(place)
        with damage(place, self.name(0)):
            content = self._content(0)
        self._key = next((key for key in ("moments", *LATENT) if key in content), "")
        if not self._key:
            raise DataError(f"--data {place}: {self.name(0)} holds none of moments, {', '.join(LATENT)}")
        self._std = ""
        with damage(place, self.name(0)):
            first = three_axes(_numbers(content[self._key]))
            whole = len(first) == wanted.channels  # then even what is called moments is a sample
            if self._key == "moments" and not whole:
                self._std = "log-variance"
            elif "std" in content or has_std(first, wanted):
                self._std = "std"
            shape = self.row(0, False).shape
        layout = layout_of(shape, bool(self._std), None if self._std else 1.0)
        contents = Contents("latents in a file each", notes=said_of(layout))
        folders = sorted({_folder(name) for name, _ in self._files}, key=by_name)
        if "label" in content:
            labels = self._labels(wanted)
        else:
            numbers = {name: number for number, name in enumerate(folders)}
            labels = torch.tensor([numbers[_folder(name)] for name, _ in self._files])
            contents.classes = tuple(folders) if folders != [""] else ()
        mirrors = f"{self._key}_flip" in content
        super().__init__(place, layout, labels, contents, wanted, mirrors=mirrors)
        contents.checksum = checksum_of(self._files, labels)

    def _labels(self, wanted: Wanted) -> torch.Tensor:
        values = []
        for number in range(len(self._files)):
            with damage(self.place, self.name(number)):
                label = self._content(number)["label"]
                values.append(label if type(label) is int else int(np.asarray(label).reshape(())))
            if len(values) % 100_000 == 0:
                wanted.say(f"{len(values)} of {len(self._files)} labels read")
        with damage(self.place, "labels"):
            return numbered(values)

    def row(self, number: int, mirrored: bool) -> np.ndarray:
        content = self._content(number)
        row = three_axes(_numbers(content[f"{self._key}_flip" if mirrored else self._key]))
        if self._std == "log-variance":
            return with_std(row)
        return np.concatenate([row, three_axes(_numbers(content["std"]))]) if "std" in content else row

    def _content(self, number: int) -> dict[str, Any]:
        """What a file holds, by name; a tensor alone is "latent". Raises whatever torch and zip do."""
        name = self._files[number][0]
        content = read_file(self.place / name, LARGEST_FILE, follow=True)
        if name.endswith(".npz"):
            return {key.removesuffix(".npy"): from_npy(part) for key, part in _members(content)}
        with torch.serialization.safe_globals(_arrays()):
            found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        return found if isinstance(found, dict) else {"latent": found}

    def name(self, number: int) -> str:
        return self._files[number][0]


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _members(content: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if sum(info.file_size for info in archive.infolist()) > LARGEST_FILE:
            raise ValueError("unpacks to more than a latent has")
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


def _numbers(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        return value.detach().float().numpy()
    if not isinstance(value, np.ndarray):
        raise ValueError(f"holds {type(value).__name__} in place of numbers")
    return value


def _arrays() -> list[Any]:
    """What torch's restricted reader must know to read numpy's arrays, by the names of numpy 1 and 2."""
    make = np.zeros(0).__reduce__()[0]
    names: list[Any] = [(make, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    return [*names, np.ndarray, np.dtype, *(type(np.dtype(code)) for code in ("f2", "f4", "f8", "i4", "i8"))]
