"""Files of others: in which order they are, and whether they are still what they were when they were found."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..conditions import BY_NAME, IN_ORDER
from ..dataset import by_name

LOOKED_AT = 2000
"""Entries of folders by which a format is recognised."""


class Files:
    """Files by number, with their bytes and times of change."""

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        """names: below `root`, with / between folders. Raises OSError for one that is missing."""
        self._root, self.names = root, names
        self._marks = np.array([self._mark(number) for number in range(len(names))], np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self.names)

    def path(self, number: int) -> Path:
        """Where a file lies."""
        return self._root / self.names[number]

    def changed(self, number: int) -> bool:
        """Whether a file is not as it was found. Raises OSError for one that is gone."""
        return self._mark(number) != tuple(self._marks[number])

    def _mark(self, number: int) -> tuple[int, int]:
        status = os.stat(os.path.join(self._root, self.names[number]))  # a Path of each of a million takes seconds
        return status.st_size, status.st_mtime_ns


def by_path(name: str) -> tuple[Any, ...]:
    """Sort key of files: folder by folder, numbers as numbers and before the others; equal for no two names."""
    *folders, last = name.split("/")
    return [by_name(part) for part in (*folders, last.rpartition(".")[0] or last)], name


def is_hidden(name: str) -> bool:
    """Whether a file, or a folder that it lies in, is nobody's sample."""
    return any(part.startswith(".") for part in name.split("/"))


def files_below(place: Path, suffixes: tuple[str, ...], besides: tuple[str, ...] = ()) -> Files:
    """The files below a folder whose names end in one of some suffixes, but for some names. Raises OSError."""
    found = [name for name, entry in _walk(place, suffixes) if entry.name not in besides and entry.is_file()]
    return Files(place, sorted(found, key=by_path))


def names_below(place: Path, suffixes: tuple[str, ...], besides: tuple[str, ...] = ()) -> list[str]:
    """The names of such files among the first entries, in their order; the files are not looked at. Raises OSError."""
    found = (name for name, entry in _walk(place, suffixes, LOOKED_AT) if entry.name not in besides)
    return sorted(found, key=by_path)


def _walk(place: Path, suffixes: tuple[str, ...], most: int | None = None) -> Iterator[tuple[str, os.DirEntry[str]]]:
    waiting, seen = [""], 0
    while waiting:
        inside = waiting.pop()
        with os.scandir(place / inside) as entries:
            for entry in entries:
                if seen == most:
                    return
                seen += 1
                if entry.name.startswith(".") or (not inside and entry.name in (BY_NAME, IN_ORDER)):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(f"{inside}{entry.name}/")
                elif entry.name.endswith(suffixes):
                    yield f"{inside}{entry.name}", entry


def starts_with(path: Path, magic: bytes) -> bool:
    """Whether a file begins with some bytes."""
    try:
        if not path.is_file():  # the opening of a pipe waits for a writer
            return False
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except (OSError, ValueError):
        return False
