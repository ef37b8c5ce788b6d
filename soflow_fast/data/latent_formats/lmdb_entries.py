"""LMDB with an entry per image, in the two forms that ports of MeanFlow and MaskDiT write.

github.com/zhuyu-cs/MeanFlow, `preprocess_imagenet/main_cache.py` (after LTH14/mar): under the key "K" a pickled dict of
`moments` and `moments_flip`, float32 [8, S, S] of mean || log-variance, unscaled, `label` and `filename`; the count
under `num_samples`. The pickles are not run: `pickled` looks at them.

github.com/Anima-Lab/MaskDiT, `extract_latent.py`: the bytes of such moments under "z-K", the label as text under
"y-K", the count under `length`. The shape is not stored; it is square, and of 8 rows where no channels are wanted.
"""

import math
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ...errors import DataError
from ..dataset import Contents, Wanted
from ..latents.layout import damage
from .arrays import numbered, three_axes, whole_number, with_std
from .files import Files
from .foreign import Foreign, layout_of
from .pickled import Call, array, described

SAID_EVERY = 100_000


def recognises(place: Path) -> bool:
    """Whether a path is a folder with data.mdb, or such a file."""
    try:
        file = place / "data.mdb" if place.is_dir() else place
        return file.suffix in (".mdb", ".lmdb") and file.is_file()
    except (OSError, ValueError):
        return False


def load(place: Path, wanted: Wanted) -> "LmdbLatents":
    """The latents of a data base. Raises DataError."""
    try:
        import lmdb  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise DataError(f"--data {place}: LMDB needs lmdb: pip install 'soflow-fast[latents]'") from None
    return LmdbLatents(place, wanted)


_locks: dict[int, threading.Lock] = {}
"""By process: a data base may be open once in each."""


class LmdbLatents(Foreign):
    """Latents by key. The data base is open for no longer than a batch takes: it must not be at a fork."""

    def __init__(self, place: Path, wanted: Wanted) -> None:
        self.place = place
        self._file = place / "data.mdb" if place.is_dir() else place
        self._env: Any = None
        self._stored, self._bytes = 0, False
        with damage(place, self._file.name):
            self._files = Files(self._file.parent, [self._file.name])
            with self._opened():
                self._find(place, wanted)

    def _find(self, place: Path, wanted: Wanted) -> None:
        with damage(place, self._file.name):
            count, self._bytes = self._count()
            likely = [channels for channels in (wanted.channels, 4, 8, 16, 32) if channels]
            if self._bytes:
                length = len(self._need("z-0"))
                self._stored = 2 * next((c for c in likely if self._side(length, 2 * c)), likely[0])
        labels, without = [], []
        for number in range(count):
            with damage(place, self.name(number)):
                label, twin = self._label(number)
                labels.append(label)
                without += [] if twin else [number]
            if len(labels) % SAID_EVERY == 0:
                wanted.say(f"{len(labels)} of {count} labels read; --from of the encode command saves that")
        with damage(place, self.name(0)):
            first = self.row(0, False)
        with damage(place, "labels"):
            numbers = numbered(labels)
        contents = Contents("latents in LMDB")
        if 0 < len(without) < count:
            contents.notes.append(f"flipped latents are not used: {self.name(without[0])} has none")
        super().__init__(place, layout_of(first.shape, std=True), numbers, contents, wanted, mirrors=not without)

    def read(self, index: Tensor, mirrored: Tensor | None = None) -> Tensor:
        self._check_files([0])
        with damage(self.place, self._file.name), self._opened():
            return super().read(index, mirrored)

    def _count(self) -> tuple[int, bool]:
        """Of the entries, and whether they are bytes of moments. Raises ValueError."""
        for key in ("num_samples", "length"):
            said = self._get(key)
            if said is not None:
                count = _whole(said)
                if not 0 < count <= self._env.stat()["entries"]:
                    raise ValueError(f"says {key} {count} with {self._env.stat()['entries']} entries")
                return count, key == "length"
        raise ValueError("has neither num_samples nor length")

    def _label(self, number: int) -> tuple[int, bool]:
        """The label of an entry, and whether there is a twin. Raises ValueError."""
        if self._bytes:
            return _whole(self._need(f"y-{number}")), False
        entry = self._entry(number)
        label = entry["label"]
        return whole_number(array(label) if isinstance(label, Call) else label), "moments_flip" in entry

    def _entry(self, number: int) -> dict[str, Any]:
        found = described(self._need(str(number)))
        if not isinstance(found, dict) or not {"moments", "label"} <= found.keys():
            raise ValueError("holds no moments and label")
        return found

    def row(self, number: int, mirrored: bool) -> np.ndarray:
        if not self._bytes:
            return with_std(three_axes(array(self._entry(number)["moments_flip" if mirrored else "moments"])))
        content = self._need(f"z-{number}")
        side = self._side(len(content), self._stored)
        if not side:
            raise ValueError(f"has {len(content)} bytes, which is not {self._stored} squares of float32")
        return with_std(np.frombuffer(content, "<f4").reshape(self._stored, side, side))

    @staticmethod
    def _side(length: int, stored: int) -> int:
        """Height of so many squares of float32 of some bytes; 0, if they are of another length."""
        side = math.isqrt(length // (4 * stored))
        return side if length == 4 * stored * side * side else 0

    def file(self, number: int) -> int:
        return 0

    def name(self, number: int) -> str:
        return f"entry {'z-' if self._bytes else ''}{number}"

    def _need(self, key: str) -> bytes:
        found = self._get(key)
        if found is None:
            raise ValueError(f"has no key {key}")
        return found

    def _get(self, key: str) -> bytes | None:
        with self._env.begin(buffers=False) as transaction:
            return transaction.get(key.encode())

    @contextmanager
    def _opened(self) -> Iterator[None]:
        import lmdb  # pyright: ignore[reportMissingImports]

        where, below = str(self.place), self.place.is_dir()
        with _locks.setdefault(os.getpid(), threading.Lock()):
            with lmdb.open(where, readonly=True, lock=False, readahead=False, create=False, subdir=below) as self._env:
                length = (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"]
                if self._file.stat().st_size < length:  # what lies behind its end would end the process
                    raise ValueError(f"has {self._file.stat().st_size} bytes of {length}")
                yield
            self._env = None


def _whole(text: bytes) -> int:
    """The number that a text is. Raises ValueError."""
    if not re.fullmatch(rb"-?[0-9]{1,19}", text):
        raise ValueError(f"has {text[:20]!r} in place of a whole number")
    return int(text)
