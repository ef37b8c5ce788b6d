"""Whose folder it is, which files in it are images of a command, and which of them are there and whole."""

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np

from ...errors import ConfigError, storage
from ...files import LOCK, locked, make_folder, read_file, regular_file, remove, sha256, write_file
from ..images import is_whole_png
from .settings import MANIFEST, Settings, read_archive, read_settings

GRID, NPZ, PARTS = "grid.png", "samples.npz", ".parts"
"""The grid of the first images; all of them as arrays; and the pieces of that, a file for each batch, until it is."""
IMAGE = re.compile(r"\d{5,}\.(png|npy)")
STALE = re.compile(r"\..+\.partial-\d+")
"""Names of files that a process which was killed has left half written."""
LARGEST = 2**31
"""Bytes of an image's file."""
THREADS = min(16, len(os.sched_getaffinity(0)))
"""That make, write and check files: a PNG of 256 x 256 pixels takes a processor about ten milliseconds."""


class Folder:
    """The files of a drawing. Each has its name when it is whole, so that those which are there need not be drawn."""

    def __init__(self, path: Path, settings: Settings, run: str, archive: str = "") -> None:
        """archive: the SHA-256 that samples.npz has; "": it is not there, or not what this command has written."""
        self.path, self.settings, self.run, self.archive = path, settings, run, archive
        self.ending = "npy" if settings.latents else "png"
        self.singly = settings.format != "npz"
        """Whether each image has a file."""
        self.archived = settings.format != "png"
        """Whether there is to be samples.npz."""

    @property
    def parts(self) -> bool:
        """Whether each batch has a file: until samples.npz is written of them."""
        return self.archived and not self.archive

    def image(self, i: int) -> Path:
        """The file of image i."""
        return self.path / f"{i:05d}.{self.ending}"

    def part(self, rows: range) -> Path:
        """The file of a batch, uint8 [len(rows), H, W, C]."""
        return self.path / PARTS / f"{rows.start:05d}.npy"

    def begin(self) -> None:
        """Write the manifest, and make room for parts. Raises OSError."""
        self._write_manifest()
        if self.parts:
            make_folder(self.path / PARTS)
            for path in (self.path / PARTS).glob(".*.partial-*"):
                path.unlink()

    def end(self) -> None:
        """Keep the SHA-256 of samples.npz, which is there now, and only then remove its parts. Raises OSError."""
        if self.parts:
            self.archive = sha256(self.path / NPZ)
            self._write_manifest()
        if self.archived:
            shutil.rmtree(self.path / PARTS, ignore_errors=True)

    def _write_manifest(self) -> None:
        write_file(self.path / MANIFEST, self.settings.to_json(Path(self.run).name, self.archive).encode())

    def missing(self, batches: Sequence[range]) -> list[range]:
        """The batches of which something is not there, or not whole. Raises OSError."""
        names = set(os.listdir(self.path))
        parts = set(os.listdir(self.path / PARTS)) if PARTS in names else set()

        def is_missing(rows: range) -> bool:
            if self.parts and not (self.part(rows).name in parts and _is_part(self.part(rows), len(rows))):
                return True
            files = [self.image(i) for i in rows] if self.singly else []
            return not (all(file.name in names for file in files) and all(map(is_whole, files)))

        with ThreadPoolExecutor(THREADS, "check") as pool:
            return [rows for rows, lacks in zip(batches, pool.map(is_missing, batches), strict=True) if lacks]


@contextmanager
def taken(out: Path, settings: Settings, run: str, overwrite: bool, warn: Callable[[str], None]) -> Iterator[Folder]:
    """Make the folder if need be, and be the only process that draws into it.

    Of a folder that gets no image nothing is left at the end but what was there before.

    Args:
        run: what is drawn from, of whose path the manifest has the last part.
        overwrite: images of another command are removed, and not refused. Files of other names stay.

    Raises ConfigError if it holds something else, and StorageError.
    """
    with ExitStack() as held:
        with storage(f"--out {out}"):
            _check(out, settings, overwrite)  # before there is a lock in it
            new = not out.exists()
            make_folder(out)
            held.enter_context(locked(out, f"--out {out}: another process draws into it", warn))
            held.callback(_leave, out, new)
            ours = _check(out, settings, overwrite)
            for name in os.listdir(out):
                is_file = name == PARTS or not (out / name).is_dir()
                if is_file and (STALE.fullmatch(name) or (not ours and _is_made(name))):
                    remove(out / name)
            folder = Folder(out, settings, run, _archive(out, ours) if settings.format != "png" else "")
            folder.begin()
        yield folder


def is_whole(path: Path) -> bool:
    """Whether the file of an image is. Raises OSError.

    PNGs have checksums. A .npy has none, so it was on the disk before it got its name; a look at its length is all.
    """
    if path.suffix == ".png":
        return is_whole_png(read_file(path, LARGEST))
    return _array(path) is not None


def _array(path: Path) -> np.ndarray | None:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError):
        return None


def _is_part(path: Path, count: int) -> bool:
    found = _array(path)
    return found is not None and len(found) == count


def _archive(out: Path, ours: bool) -> str:
    """The SHA-256 of samples.npz, if it is the one that the manifest of these settings names, and else "".

    It says more than the checksums in the file, which another program's file has as well. Raises OSError, also for what
    is no regular file, as nothing could be written in its place.
    """
    digest = read_archive(out) if ours else ""
    try:
        with regular_file(out / NPZ, sys.maxsize):
            return digest if digest and sha256(out / NPZ) == digest else ""
    except FileNotFoundError:
        return ""


def _check(out: Path, settings: Settings, overwrite: bool) -> bool:
    """Whether a folder is of these settings. Raises ConfigError if it is not and is not to be taken."""
    if not out.exists():
        return False
    if not out.is_dir():
        raise ConfigError(f"--out {out}: is a file")
    advice = "give another folder, or --overwrite"
    names = [name for name in os.listdir(out) if name != LOCK and not STALE.fullmatch(name)]
    try:
        old = read_settings(out)
        if old is None and not overwrite and names:
            raise ValueError(f"holds {min(names)}, which is not of this command")
    except ValueError as error:
        if overwrite:
            return False
        raise ConfigError(f"--out {out}: {error}; {advice}") from None
    changed = settings.differences(old) if old is not None else []
    if changed and not overwrite and _holds_any(out):
        raise ConfigError(f"--out {out}: holds images of another command ({'; '.join(changed)}); {advice}")
    return old is not None and not changed


def _is_made(name: str) -> bool:
    """Whether a file is named as what `sample` makes."""
    return name in (GRID, NPZ, PARTS) or IMAGE.fullmatch(name) is not None


def _holds_any(out: Path) -> bool:
    """Whether a folder holds anything that `sample` has made."""
    names = os.listdir(out)
    return any(_is_made(name) for name in names if name != PARTS) or (PARTS in names and any((out / PARTS).iterdir()))


def _leave(out: Path, new: bool) -> None:
    with suppress(OSError):
        if not _holds_any(out):
            for name in (PARTS, MANIFEST, *((LOCK,) if new else ())):
                remove(out / name)
            if new:
                out.rmdir()
