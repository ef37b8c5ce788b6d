"""What folders and zips of images share: which files are images, and names that take little memory."""

import abc
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

IMAGES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib", ".gif", ".webp", ".tif", ".tiff"}
OTHERS = {
    ".avi", ".bin", ".bz2", ".cfg", ".cr2", ".csv", ".dng", ".gz", ".h5", ".html", ".ini", ".json", ".jsonl", ".log",
    ".mat", ".md", ".mov", ".mp3", ".mp4", ".nef", ".npy", ".npz", ".pdf", ".parquet", ".pkl", ".pt", ".pth", ".py",
    ".rar", ".safetensors", ".sh", ".svg", ".tar", ".toml", ".tsv", ".txt", ".wav", ".xml", ".xz", ".yaml", ".yml",
    ".zip",
}  # fmt: skip
"""Endings of files that are no images; those with an ending in neither list are images if they begin like one."""
LABELS = frozenset({"dataset.json", "metadata.jsonl", "metadata.csv"})
NOBODYS = frozenset({"__macosx", "@eadir", "thumbs.db", "desktop.ini"})
"""What computers add to folders, beside names with a leading dot."""
LARGEST_FILE = 64 * 2**20
LARGEST_TEXT = 512 * 2**20
BEGINNING = 32
"""Bytes by which the kind of a file is known."""


def is_nobodys(name: str) -> bool:
    """Whether a file or folder is one that a computer made for itself."""
    hidden = name.startswith(".") and name not in (".", "..") and "\\" not in name
    return hidden or name.lower() in NOBODYS


def ending(name: str) -> str:
    """Of a file's name or path, in lower case; "no ending"."""
    return os.path.splitext(name)[1].lower() or "no ending"


def begins_like_an_image(content: bytes) -> bool:
    """Whether a file's first bytes are those of a format that is read."""
    if content[:2] == b"BM":
        return int.from_bytes(content[14:18], "little") in (12, 40, 52, 56, 64, 108, 124)
    if content[:4] == b"RIFF":
        return content[8:12] == b"WEBP"
    begins = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
    return content.startswith(begins)


class Names(Sequence[str]):
    """Names one after the other in one piece of memory, and where each ends."""

    def __init__(self, names: Iterable[str]) -> None:
        text, ends = bytearray(), array("q", [0])
        for name in names:
            text += name.encode("utf-8", "surrogatepass")
            ends.append(len(text))
        self._text, self._ends = bytes(text), np.array(ends)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[str]: ...
    def __getitem__(self, number: int | slice) -> str | Sequence[str]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self._text[self._ends[number] : self._ends[number + 1]].decode("utf-8", "surrogatepass")


class Listing(abc.ABC):
    """The images of a folder or zip, in the order of their names, and what else it holds."""

    kind: str
    names: Sequence[str]
    sizes: np.ndarray
    folders: set[str]
    """All that are somebody's, whatever they hold, without the one that is listed."""
    labels: list[str]
    """Files that may say the classes."""
    left_out: Counter[str]
    stamp: str
    """Another one, when anything of it has changed."""

    def __init__(self, place: Path) -> None:
        self.place = os.path.abspath(place)
        self.folders, self.labels, self.left_out = set(), [], Counter()

    @abc.abstractmethod
    def read(self, number: int) -> bytes:
        """The content of an image; in any thread or process. Raises OSError and what libraries raise of damage."""

    @abc.abstractmethod
    def text(self, name: str) -> bytes:
        """The content of one of `labels`. Raises as `read` does."""

    def _is_image(self, name: str, beginning: Any) -> bool:
        """Counts what is none. beginning(): the first bytes; what cannot be read is taken for an image, hence named."""
        kind = ending(name)
        if kind in IMAGES:
            return True
        if name.rpartition("/")[2].lower() in LABELS:
            self.labels.append(name)
            return False
        try:
            found = kind not in OTHERS and begins_like_an_image(beginning())
        except Exception:
            return True
        if not found:
            self.left_out[kind] += 1
        return found

    def _add_folder(self, name: str) -> None:
        while name and name not in self.folders:
            self.folders.add(name)
            name = name.rpartition("/")[0]

    def _keep(self, names: list[str], rows: array, columns: int) -> np.ndarray:
        """Sort the images by their names; returns the rows, int64 [N, columns], sorted likewise."""
        order = sorted(range(len(names)), key=names.__getitem__)
        self.names = Names(names[i] for i in order)
        return np.array(rows, np.int64).reshape(-1, columns)[np.array(order, np.int64)]
