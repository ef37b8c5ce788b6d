"""LMDB with an entry per image, in the two forms that ports of MeanFlow and MaskDiT write.

github.com/zhuyu-cs/MeanFlow, `preprocess_imagenet/main_cache.py` (after LTH14/mar): under the key "K" a pickled dict of
`moments` and `moments_flip`, float32 [8, S, S] of mean || log-variance, unscaled, `label` and `filename`; the count
under `num_samples`. The pickles are not run: `pickled` looks at them.

github.com/Anima-Lab/MaskDiT, `extract_latent.py`: the bytes of such moments under "z-K", the label as text under
"y-K", the count under `length`. The shape is not stored; it is square, and of 8 rows where no channels are wanted.
"""

import math
import os
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
from .foreign import Foreign, checksum_of, layout_of, numbered, three_axes, with_std
from .pickled import array, described

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
        with damage(place, self._file.name), self._opened():
            self._find(place, wanted)

    def _find(self, place: Path, wanted: Wanted) -> None:
        with damage(place, self._file.name):
            count, self._bytes = self._count()
            likely = [channels for channels in (wanted.channels, 4, 8, 16, 32) if channels]
            if self._bytes:
                length = len(self._need("z-0"))
                self._stored = 2 * next((c for c in likely if self._side(length, 2 * c)), likely[0])
        labels = []
        for number in range(count):
            with damage(place, self.name(number)):
                labels.append(self._label(number))
            if len(labels) % SAID_EVERY == 0:
                wanted.say(f"{len(labels)} of {count} labels read; --from of the encode command saves that")
        with damage(place, self.name(0)):
            first = self.row(0, False)
            mirrors = not self._bytes and "moments_flip" in self._entry(0)
        with damage(place, "labels"):
            numbers = numbered(labels)
        contents = Contents("latents in LMDB")
        super().__init__(place, layout_of(first.shape, std=True), numbers, contents, wanted, mirrors=mirrors)
        contents.checksum = checksum_of([(self._file.name, self._file.stat().st_size)], numbers)

    def read(self, index: Tensor, mirrored: Tensor | None = None) -> Tensor:
        with damage(self.place, self._file.name), self._opened():
            return super().read(index, mirrored)

    def _count(self) -> tuple[int, bool]:
        """Of the entries, and whether they are bytes of moments. Raises ValueError."""
        for key in ("num_samples", "length"):
            said = self._get(key)
            if said is not None:
                count = int(bytes(said[:20]))
                if not 0 < count <= self._env.stat()["entries"]:
                    raise ValueError(f"says {key} {count} with {self._env.stat()['entries']} entries")
                return count, key == "length"
        raise ValueError("has neither num_samples nor length")

    def _label(self, number: int) -> int:
        if self._bytes:
            return int(bytes(self._need(f"y-{number}")[:20]))
        label = self._entry(number)["label"]
        return label if type(label) is int else int(array(label).reshape(()))

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
