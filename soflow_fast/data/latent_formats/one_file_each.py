"""CLASS/NAME.npz or CLASS/NAME.pt per image.

.npz as MAR's `main_cache.py` writes (github.com/LTH14/mar): `moments` and `moments_flip`, [2C, S, S] of
mean || log-variance, unscaled. .pt as ports of it write with torch.save: a dict of the same names, tensors or arrays;
or `latent` (or `latents`, `mean`) with `std`, with `logvar` or with neither, or a tensor alone; a `label` in the dict
goes before the folder. A tensor that is not of `moments` is mean || std, or a sample that is scaled already.
"""

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import DataError
from ...files import read_file
from ..dataset import Contents, Wanted, by_name
from ..latents.layout import damage
from .arrays import from_npy, from_torch, numbered, std_of, three_axes, whole_number, with_std
from .files import files_below, names_below
from .foreign import LARGEST_FILE, Foreign, has_std, layout_of, said_of

SUFFIXES = (".pt", ".npz")
NOT_LATENTS = ("latents_stats.pt", "latent_stats.pt", "label_cluster.pt")
LATENT = ("latent", "latents", "mean")
PARTS = ("moments", *LATENT, "std", "logvar")
NAMES = (*PARTS, *(f"{part}_flip" for part in PARTS), "label")
"""What all files of a folder hold, or none of them."""
SAID_EVERY = 100_000


def recognises(place: Path) -> bool:
    """Whether a path is a folder with .pt files, or with folders of .npz files that hold moments."""
    try:
        found = names_below(place, SUFFIXES, NOT_LATENTS) if place.is_dir() else []
        if not found:
            return False
        first = found[0]
        if first.endswith(".pt"):
            return True
        with zipfile.ZipFile(place / first) as archive:
            return "moments.npy" in archive.namelist()
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile):
        return False


def load(place: Path, wanted: Wanted) -> "SingleLatents":
    """The latents of a folder. Raises DataError."""
    return SingleLatents(place, wanted)


class SingleLatents(Foreign):
    """Latents in a file each, whose folder is their class."""

    def __init__(self, place: Path, wanted: Wanted) -> None:
        self.place = place
        with damage(place, "the folder"):
            self._files = files_below(place, SUFFIXES, NOT_LATENTS)
        if not len(self._files):
            raise DataError(f"--data {place}: holds no file of latents")
        with damage(place, self.name(0)):
            content = self._content(0)
        self._holds = {name for name in content if name in NAMES}
        self._key = next((key for key in ("moments", *LATENT) if key in content), "")
        if not self._key:
            raise DataError(f"--data {place}: {self.name(0)} holds none of moments, {', '.join(LATENT)}")
        self._std = ""
        with damage(place, self.name(0)):
            first = three_axes(_numbers(content[self._key]))
            whole = len(first) == wanted.channels  # then even what is called moments is a sample
            if self._key == "moments" and not whole:
                self._std = "moments"
            else:
                self._std = next((name for name in ("std", "logvar") if name in content), "")
            shape = self.row(0, False).shape
        has = bool(self._std) or has_std(first, wanted)
        layout = layout_of(shape, has, None if has else 1.0)
        contents = Contents("latents in a file each", notes=said_of(layout))
        names = self._files.names
        folders = sorted({_folder(name) for name in names}, key=by_name)
        if "label" in content:
            labels = self._labels(wanted)
        else:
            numbers = {name: number for number, name in enumerate(folders)}
            labels = torch.tensor([numbers[_folder(name)] for name in names])
            contents.classes = tuple(folders) if folders != [""] else ()
        twins = [f"{part}_flip" for part in dict.fromkeys((self._key, self._std)) if part]
        without = [name for name in twins if name not in content]
        if without and len(without) < len(twins):
            contents.notes.append(f"flipped latents are not used: {self.name(0)} has no {without[0]}")
        super().__init__(place, layout, labels, contents, wanted, mirrors=not without)

    def _labels(self, wanted: Wanted) -> torch.Tensor:
        values = []
        for number in range(len(self._files)):
            with damage(self.place, self.name(number)):
                values.append(whole_number(self._alike(number)["label"]))
            if len(values) % SAID_EVERY == 0:
                wanted.say(f"{len(values)} of {len(self._files)} labels read")
        with damage(self.place, "labels"):
            return numbered(values)

    def row(self, number: int, mirrored: bool) -> np.ndarray:
        content, flip = self._alike(number), "_flip" if mirrored else ""
        row = three_axes(_numbers(content[self._key + flip]))
        if self._std == "moments":
            return with_std(row)
        if not self._std:
            return row
        std = three_axes(_numbers(content[self._std + flip]))
        return np.concatenate([row, std_of(std) if self._std == "logvar" else std])

    def _alike(self, number: int) -> dict[str, Any]:
        """What a file holds. Raises ValueError if that is not what the first one does, and as `_content` does."""
        content = self._content(number)
        for name in NAMES:
            if (name in content) != (name in self._holds):
                has, other = ("no", "one") if name in self._holds else ("a", "none")
                raise ValueError(f"holds {has} {name}, {self.name(0)} {other}")
        return content

    def _content(self, number: int) -> dict[str, Any]:
        """What a file holds, by name; a tensor alone is "latent". Raises whatever torch and zip do."""
        name = self.name(number)
        content = read_file(self._files.path(number), LARGEST_FILE, follow=True)
        if name.endswith(".npz"):
            return {key.removesuffix(".npy"): from_npy(part) for key, part in _members(content)}
        found = from_torch(content)
        return found if isinstance(found, dict) else {"latent": found}

    def name(self, number: int) -> str:
        return self._files.names[number]


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _members(content: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if sum(info.file_size for info in archive.infolist()) > LARGEST_FILE:
            raise ValueError("unpacks to more than a latent has")
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


def _numbers(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().float().numpy()
    if not isinstance(value, np.ndarray):
        raise ValueError(f"holds {getattr(value, 'dtype', type(value).__name__)} in place of numbers")
    return value
