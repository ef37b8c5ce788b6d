"""Which tar shards are meant by a path, and what lies beside them."""

import gzip
import os
import re
import tarfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

from ..errors import DataError, printable
from .images.labels import SPLITS
from .images.listing import IMAGES, ending, is_nobodys

DEEPEST = 3
"""Folders in one another that are looked through."""


def shards_of(place: Path, where: str) -> tuple[list[Path], Counter[str]]:
    """The shards in a folder, or in the one that it is wrapped around, and what else is there, by its ending.

    They are in the order of their names, numbers in them as numbers. Raises OSError, and DataError for folders of
    shards side by side and for shards that bear the names of several splits.
    """
    folders = folders_of_shards(place)
    if len(folders) > 1:
        first, second = (printable(str(folder.relative_to(place))) for folder in folders[:2])
        raise DataError(f"{where}: holds shards in {first} and {second}: name one of them, {where}/{first}")
    folder = folders[0] if folders else place
    shards = tars_in(folder)
    if len(splits := {split: shard for shard in reversed(shards) if (split := _split(shard.name))}) > 1:
        first, second = (printable(splits[split].name) for split in sorted(splits)[:2])
        raise DataError(f"{where}: holds {first} and {second} side by side: put the shards of one split into a folder")
    names = {shard.name for shard in shards}
    beside = (entry.name for entry in folder.iterdir() if entry.name not in names)
    return shards, Counter("hidden" if is_nobodys(name) else ending(name) for name in beside)


def folders_of_shards(place: Path, deep: int = 0) -> list[Path]:
    """Itself, if it is a folder with shards and without folders; else its folders, if they all are; else none."""
    inner, images = [], False
    with os.scandir(place) as entries:
        for entry in entries:
            if not is_nobodys(entry.name):
                inner += [Path(entry)] if entry.is_dir() else []
                images |= ending(entry.name) in IMAGES
    if deep and images:
        return []
    if tars_in(place):
        return [] if inner else [place]
    found: list[Path] = []
    for folder in sorted(inner) if deep < DEEPEST else ():
        below = folders_of_shards(folder, deep + 1)
        if not below:
            return []
        found += below
    return found


def is_tar(file: Path) -> bool:
    """Whether a file begins with the header of a tar, compressed by gzip or not."""
    with file.open("rb") as opened:
        head = opened.read(tarfile.BLOCKSIZE)
    try:
        if head[:2] == b"\x1f\x8b":
            with gzip.open(file) as unpacked:
                head = unpacked.read(tarfile.BLOCKSIZE)
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except (OSError, EOFError, ValueError, zlib.error, tarfile.TarError):
        return False
    return True


def tars_in(folder: Path) -> list[Path]:
    def by_number(file: Path) -> list[Any]:
        return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"([0-9]+)", file.name)]

    found = (file for file in folder.iterdir() if re.search(r"(\.tar(\.gz)?|\.tgz)$", file.name.lower()))
    return sorted((file for file in found if file.is_file() and file.name[0] != "."), key=by_number)


def _split(name: str) -> str:
    """The word in a shard's name that is one of a split, "" if there is none."""
    return next((word for word in re.split(r"[^a-z]+", name.lower()) if word in SPLITS), "")
