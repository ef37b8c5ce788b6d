"""Two folders of .npy, as fast-DiT's `extract_features.py` writes them (github.com/chuanyangjin/fast-DiT).

`imagenet256_features/K.npy`, float32 [1, 4, S, S], are samples that are scaled by 0.18215 already;
`imagenet256_labels/K.npy`, int64 [1], are their labels.
"""

from pathlib import Path

import numpy as np

from ...errors import DataError
from ...files import read_file
from ..dataset import Contents, Wanted
from ..latents.layout import damage
from .arrays import from_npy, numbered, three_axes
from .files import files_below
from .foreign import LARGEST_FILE, Foreign, layout_of

FEATURES, LABELS = "_features", "_labels"
SAID_EVERY = 100_000


def recognises(place: Path) -> bool:
    """Whether a path is a folder with NAME_features and NAME_labels."""
    return _name(place) is not None


def _name(place: Path) -> str | None:
    try:
        names = {entry.name for entry in place.iterdir() if entry.is_dir()} if place.is_dir() else set()
    except (OSError, ValueError):
        return None
    stems = sorted(name.removesuffix(FEATURES) for name in names if name.endswith(FEATURES))
    return next((stem for stem in stems if stem + LABELS in names), None)


def load(place: Path, wanted: Wanted) -> "PairedLatents":
    """The latents of both folders. Raises DataError."""
    return PairedLatents(place, wanted)


class PairedLatents(Foreign):
    """Samples of latents, already scaled, each with its label in a file of the same name."""

    def __init__(self, place: Path, wanted: Wanted) -> None:
        stem = _name(place)
        self.place, self._folder = place, f"{stem}{FEATURES}"
        with damage(place, self._folder):
            self._files = files_below(place / self._folder, (".npy",))
        if not len(self._files):
            raise DataError(f"--data {place}: {self._folder} holds no .npy file")
        values = []
        for name in self._files.names:
            with damage(place, f"{stem}{LABELS}/{name}"):
                found = from_npy(read_file(place / f"{stem}{LABELS}" / name, 4096, follow=True))
                if found.size != 1 or found.dtype.kind not in "iu":
                    raise ValueError(f"holds {found.dtype} {found.shape}, no label")
                values.append(int(found.reshape(())))
            if len(values) % SAID_EVERY == 0:
                wanted.say(f"{len(values)} of {len(self._files)} labels read; --from of the encode command saves that")
        with damage(place, self.name(0)):
            shape = self.row(0, False).shape
        contents = Contents("latents in .npy, features and labels", notes=["latents taken as scaled already"])
        with damage(place, f"{stem}{LABELS}"):
            labels = numbered(values)
        super().__init__(place, layout_of(shape, False, 1.0), labels, contents, wanted, mirrors=False)

    def row(self, number: int, mirrored: bool) -> np.ndarray:
        return three_axes(from_npy(read_file(self._files.path(number), LARGEST_FILE, follow=True)))

    def name(self, number: int) -> str:
        return f"{self._folder}/{self._files.names[number]}"
