"""Reading a folder of latents: rows are copied out of memory-mapped shards."""

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError
from ..dataset import Contents, Wanted
from .check import mapped, verify
from .layout import Latents, check_labels, check_wanted, damage
from .manifest import MANIFEST, Header, Shard, checksum, file_name, read_manifest


def recognises(place: Path) -> bool:
    """Whether a path is a folder with a manifest of latents."""
    try:
        return (place / MANIFEST).is_file()
    except (OSError, ValueError):
        return False


def is_whole(place: Path) -> bool:
    """Whether a path is a folder with all the latents that its manifest promises; their content is not looked at."""
    try:
        header, shards = read_manifest(place)
    except (OSError, ValueError):
        return False
    return sum(shard.count for shard in shards) == header.count


def load(place: Path, wanted: Wanted) -> "MappedLatents":
    """The latents of a folder, all files checked. Raises DataError."""
    try:
        header, shards = read_manifest(place)
    except OSError as error:
        raise DataError(f"--data {place}: {MANIFEST}: {error.strerror or error}") from None
    except ValueError as error:
        raise DataError(f"--data {place}: {MANIFEST} {error}") from None
    done = sum(shard.count for shard in shards)
    if done < header.count:
        again = "give the command that encodes them again, it goes on"
        raise DataError(f"--data {place}: only {done} of {header.count} images are encoded; {again}")
    check_wanted(place, header.layout, wanted)
    verify(place, header.layout, shards, wanted.say)
    return MappedLatents(place, header, shards)


class MappedLatents(Latents):
    """Latents in mapped files: a batch costs the copy of its rows. Safe to be read in forked processes."""

    copies = True

    def __init__(self, place: Path, header: Header, shards: list[Shard]) -> None:
        classes = len(header.classes)
        labels = torch.cat([_labels(place, header, number, shard) for number, shard in enumerate(shards)])
        check_labels(place, lambda i: f"latent {i}", labels, classes or 1)
        contents = Contents("latents", header.classes, checksum=checksum(header, shards), source=header.source)
        contents.conditions = header.conditions
        if header.layout.vae:
            contents.notes.append(f"latents of the VAE {header.layout.vae}")
        super().__init__(place, header.layout, labels, contents, mirrors=header.flipped)
        self._rows, self._counts = header.rows, [shard.count for shard in shards]
        self._maps: dict[tuple[str, int], np.ndarray] = {}
        self._marks: dict[tuple[str, int], tuple[int, int]] = {}
        for kind in ("shard", "mirrored") if header.flipped else ("shard",):
            for number in range(len(shards)):
                status = os.stat(place / file_name(kind, number))
                self._marks[kind, number] = status.st_size, status.st_mtime_ns
                self._map(kind, number)

    def read(self, index: Tensor, mirrored: Tensor | None = None) -> Tensor:
        """float16 [n, 2C, H, W] or [n, C, H, W]. Raises DataError for a file that is not as it was at the start."""
        flags = mirrored.tolist() if mirrored is not None else [False] * len(index)
        if not self.mirrors and any(flags):
            raise DataError(f"--data {self.place}: there are no latents of mirrored images")
        kinds = ["mirrored" if flag else "shard" for flag in flags]
        numbers, rows = (part.tolist() for part in (index // self._rows, index % self._rows))
        for kind, number in set(zip(kinds, numbers, strict=True)):
            self._check(kind, number)
        out = np.empty((len(index), *self.layout.row()), np.float16)
        for i, (kind, number, row) in enumerate(zip(kinds, numbers, rows, strict=True)):
            out[i] = self._map(kind, number)[row]
        return torch.from_numpy(out)

    def _check(self, kind: str, number: int) -> None:
        """Raise DataError for a file that has changed: what is mapped of one that was cut off would end the process."""
        name = file_name(kind, number)
        try:
            status = os.stat(self.place / name)
        except OSError as error:
            raise DataError(f"--data {self.place}: {name}: {error.strerror or error}") from None
        if (status.st_size, status.st_mtime_ns) != self._marks[kind, number]:
            raise DataError(f"--data {self.place}: {name} has changed during the run")

    def _map(self, kind: str, number: int) -> np.ndarray:
        if (kind, number) not in self._maps:
            name = file_name(kind, number)
            self._maps[kind, number] = mapped(self.place, name, self.layout, self._counts[number])
        return self._maps[kind, number]

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"_maps": {}}


def _labels(place: Path, header: Header, number: int, shard: Shard) -> Tensor:
    name = file_name("labels", number)
    with damage(place, name):
        found = np.load(place / name, allow_pickle=False)
    if found.shape != (shard.count,) or found.dtype != np.int64:
        raise DataError(f"--data {place}: {name} is {found.dtype} {found.shape}, not int64 ({shard.count},)")
    return torch.from_numpy(found)
