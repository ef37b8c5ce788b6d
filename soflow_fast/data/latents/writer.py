"""Writing a folder of latents, batch by batch. A kill costs the shard that it falls into and nothing else."""

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError
from ...files import LOCK, make_folder, sync, write_file
from ..conditions import IN_ORDER, Conditions, read_vectors
from .check import first_wrong, mapped
from .manifest import MANIFEST, File, Header, Shard, file_name, read_manifest, to_text

SHARD_BYTES = 2**26
MOST_SHARDS = 128
"""Of each kind: a reader holds a file for each."""
PARTIAL = re.compile(rf"\.({re.escape(MANIFEST)}\.partial-\d+|([a-z]+-\d{{5}}|conditions)\.npy\.partial)")
"""Names of what a kill may leave."""


def shard_rows(count: int, row: tuple[int, ...]) -> int:
    """Latents of a shard: 64 MiB of them, or more, so that there are no more than MOST_SHARDS."""
    return max(SHARD_BYTES // (2 * int(np.prod(row))), -(-count // MOST_SHARDS), 1)


class Writer:
    """Appends latents to a folder, or goes on with one that was begun with the same header.

    A shard is written under a temporary name, synced, renamed, and only then named by the manifest. What is not named
    there is written anew, and so is everything from the first shard on that is missing or damaged. Nobody else may
    write to the folder. Methods raise OSError where the disk refuses, and DataError.
    """

    def __init__(self, folder: Path, header: Header, say: Callable[[str], None] = lambda text: None) -> None:
        """Raises DataError if the folder holds something else, and says what differs."""
        check_free(folder)
        self.folder, self.header = folder, header
        self.shards: list[Shard] = []
        self._open: dict[str, _Stream] = {}
        self._fill = 0
        make_folder(folder)
        if (folder / MANIFEST).exists():
            try:
                begun, self.shards = read_manifest(folder)
            except ValueError as error:
                raise DataError(f"{folder}: {MANIFEST} {error}") from None
            _check_same(folder, begun, header)
            self.header = begun  # with the shards' sizes
            wrong = first_wrong(folder, begun.layout, self.shards, say)
            if wrong is not None:
                say(f"{str(wrong[1]).removeprefix('--data ')}; it and what follows it are written anew")
                self.shards = self.shards[: wrong[0]]
        for path in folder.iterdir():
            if PARTIAL.fullmatch(path.name):
                path.unlink()
        if not self.shards:
            self._write_manifest()

    @property
    def done(self) -> int:
        """How many latents are kept for good."""
        return sum(shard.count for shard in self.shards)

    def kept(self, numbers: Sequence[int]) -> tuple[Tensor, ...]:
        """Latents that are kept for good, by their numbers, float16 [n, 2C, H, W] or [n, C, H, W]; and the twins'."""

        def row(kind: str, number: int) -> Tensor:
            shard, place = divmod(number, self.header.rows)
            found = mapped(self.folder, file_name(kind, shard), self.header.layout, self.shards[shard].count)
            return torch.from_numpy(found[place])

        kinds = [kind for kind in self.header.kinds() if kind != "labels"]
        return tuple(torch.stack([row(kind, number) for number in numbers]) for kind in kinds)

    def append(self, latents: Tensor, labels: Tensor, mirrored: Tensor | None = None) -> None:
        """Add the next latents, [n, 2C, H, W] or [n, C, H, W], their labels [n], and the twins' latents of a flip."""
        assert latents.shape[1:] == self.header.layout.row() and len(labels) == len(latents)
        assert (mirrored is not None) == self.header.flipped and self.done + self._fill + len(
            labels
        ) <= self.header.count
        parts = {"shard": latents.half(), "labels": labels.long()} | (
            {} if mirrored is None else {"mirrored": mirrored.half()}
        )
        for name, values in parts.items():
            if name != "labels" and not torch.isfinite(values).all():
                raise DataError(f"{self.folder}: a latent from {self.done + self._fill} on is not finite in float16")
        at = 0
        while at < len(labels):
            room = self._size() - self._fill
            for name, values in parts.items():
                self._stream(name).write(values[at : at + room])
            taken = min(room, len(labels) - at)
            at, self._fill = at + taken, self._fill + taken
            if self._fill == self._size():
                self._finish()

    def put_conditions(self, conditions: Conditions) -> None:
        """Write the vectors of all samples, unless they are there."""
        assert conditions.checksum == self.header.conditions and len(conditions) == self.header.count
        with suppress(DataError):
            there = Conditions(read_vectors(self.folder / IN_ORDER))
            if there.checksum == conditions.checksum:
                return
        dtype = conditions.dtype.newbyteorder("<").str
        stream = _Stream(self.folder / IN_ORDER, dtype, (len(conditions), conditions.size))
        try:
            for part in conditions.parts():
                stream.write(part.astype(dtype, copy=False).tobytes())
        except BaseException:
            stream.drop()
            raise
        stream.finish()
        sync(self.folder)

    def close(self) -> None:
        """Drop a shard that is not whole."""
        for stream in self._open.values():
            stream.drop()
        self._open, self._fill = {}, 0

    def _size(self) -> int:
        """Latents of the shard that is being written."""
        return min(self.header.rows, self.header.count - self.done)

    def _stream(self, kind: str) -> "_Stream":
        if kind not in self._open:
            row, dtype = ((), "<i8") if kind == "labels" else (self.header.layout.row(), "<f2")
            path = self.folder / file_name(kind, len(self.shards))
            self._open[kind] = _Stream(path, dtype, (self._size(), *row))
        return self._open[kind]

    def _finish(self) -> None:
        files = {kind: self._open[kind].finish() for kind in self.header.kinds()}
        sync(self.folder)
        self.shards.append(Shard(self._fill, files))
        self._open, self._fill = {}, 0
        self._write_manifest()

    def _write_manifest(self) -> None:
        write_file(self.folder / MANIFEST, to_text(self.header, self.shards).encode())


class _Stream:
    """A .npy file that is written front to back, hashed on the way, and appears when it is whole."""

    def __init__(self, path: Path, dtype: str, shape: tuple[int, ...]) -> None:
        self._path, self._dtype = path, dtype
        self._aside = path.with_name(f".{path.name}.partial")
        self._digest, self._bytes = hashlib.sha256(), 0
        self._file: IO[bytes] = open(self._aside, "wb")  # noqa: SIM115  # until `finish` or `drop`
        np.lib.format.write_array_header_1_0(self, {"descr": dtype, "fortran_order": False, "shape": shape})  # type: ignore[arg-type]

    def write(self, values: Tensor | bytes) -> None:
        if isinstance(values, Tensor):
            values = values.cpu().contiguous().numpy().astype(self._dtype, copy=False).tobytes()
        self._file.write(values)
        self._digest.update(values)
        self._bytes += len(values)

    def finish(self) -> File:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._aside, self._path)
        return File(self._digest.hexdigest(), self._bytes)

    def drop(self) -> None:
        self._file.close()
        self._aside.unlink(missing_ok=True)


def check_free(folder: Path) -> None:
    """Raise DataError if latents cannot be written to a path since something else is there."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: is a file")
    ours = folder.exists() and (folder / MANIFEST).exists()
    if folder.exists() and not ours and any(not _is_ours(path.name) for path in folder.iterdir()):
        raise DataError(f"{folder}: holds other files; give an empty folder, or one that does not exist")


def _is_ours(name: str) -> bool:
    return name == LOCK or PARTIAL.fullmatch(name) is not None


def _check_same(folder: Path, begun: Header, header: Header) -> None:
    """Raise DataError with the first thing in which a folder that was begun differs."""
    was, now = (asdict(h.layout) | asdict(h) for h in (begun, header))
    was["vae"], now["vae"] = (os.path.normpath(name) if name else "" for name in (was["vae"], now["vae"]))
    words = {
        "source": "encoded from other content",
        "weights": "encoded with other weights of the VAE",
        "conditions": "written with other conditions, or without",
    }
    for name in [name for name in was if name not in ("layout", "rows")]:
        if was[name] != now[name]:
            what = words.get(name, f"begun with {name} {_short(was[name])}, not {_short(now[name])}")
            raise DataError(f"{folder}: is {what}; give another folder, or remove this one")


def _short(value: object) -> str:
    text = str(value) if value != "" else "none"
    return text if len(text) <= 80 else f"{text[:77]}..."
