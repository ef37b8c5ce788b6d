"""What formats share: rows that are read one by one and checked, a checksum, a scale where no file says it."""

import abc
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError
from ..dataset import Contents, Wanted
from ..latents.layout import SD_SCALE, Factor, Latents, Layout, check_labels, check_wanted, damage, in_words
from .files import Files

LARGEST_FILE = 64 * 2**20
"""Bytes of one latent, unpacked."""
LARGEST_JSON = 2**29
ROWS_OF_CHECKSUM = 64
"""Spread evenly over all."""


class Foreign(Latents):
    """Latents that a subclass reads by number."""

    _files: Files

    def __init__(
        self, place: Path, layout: Layout, labels: Tensor, contents: Contents, wanted: Wanted, *, mirrors: bool
    ) -> None:
        """contents: its classes are named by their numbers if it has none and labels are not all 0."""
        check_wanted(place, layout, wanted)
        wrong = layout.problem()
        if wrong:
            raise DataError(f"--data {place}: {wrong}")
        super().__init__(place, layout, labels, contents, mirrors=mirrors)
        check_labels(place, self.name, labels)
        if not contents.classes and labels.any():
            contents.classes = tuple(map(str, range(int(labels.max()) + 1)))

    @abc.abstractmethod
    def row(self, number: int, mirrored: bool) -> np.ndarray:
        """A sample, any float [2C, H, W] or [C, H, W]. Raises whatever its library does."""

    @abc.abstractmethod
    def name(self, number: int) -> str:
        """What a message calls it."""

    def file(self, number: int) -> int:
        """In which of the files it lies."""
        return number

    def read(self, index: Tensor, mirrored: Tensor | None = None) -> Tensor:
        """float16 [n, 2C, H, W] or [n, C, H, W]. Raises DataError that names what is damaged, or has changed."""
        out = np.empty((len(index), *self.layout.row()), np.float16)
        flags = mirrored.tolist() if mirrored is not None else [False] * len(index)
        if not self.mirrors and any(flags):
            raise DataError(f"--data {self.place}: there are no latents of mirrored images")
        numbers = index.tolist()
        files = sorted(set(map(self.file, numbers)))
        self._check_files(files)
        try:
            self._fill(out, numbers, flags)
        except DataError:
            self._check_files(files)  # the cause, where a file was cut off while it was read
            raise
        self._check_files(files)  # HDF5 reads zeros where a file was cut off meanwhile
        self._check_rows(numbers, torch.from_numpy(out))
        return torch.from_numpy(out)

    def _fill(self, out: np.ndarray, numbers: list[int], flags: list[bool]) -> None:
        for at in sorted(range(len(numbers)), key=numbers.__getitem__):  # in the order of the files
            with damage(self.place, self.name(numbers[at])), np.errstate(over="ignore"):
                row = self.row(numbers[at], flags[at])
                if row.shape != out.shape[1:]:
                    got, wanted = in_words(row.shape), in_words(out.shape[1:])
                    raise DataError(f"--data {self.place}: {self.name(numbers[at])} is {got}, not {wanted}")
                out[at] = row

    def _check_files(self, files: Iterable[int]) -> None:
        for number in files:
            name = self._files.names[number]
            with damage(self.place, name):
                if self._files.changed(number):
                    raise DataError(f"--data {self.place}: {name} has changed during the run")

    def _check_rows(self, numbers: list[int], rows: Tensor) -> None:
        finite = torch.isfinite(rows).flatten(1).all(1)
        if not finite.all():
            number = numbers[int(finite.logical_not().nonzero()[0])]
            raise DataError(f"--data {self.place}: {self.name(number)} is not finite in float16")
        if self.layout.std:
            negative = (rows[:, self.layout.channels :] < 0).flatten(1).any(1)
            if negative.any():
                number = numbers[int(negative.nonzero()[0])]
                raise DataError(f"--data {self.place}: {self.name(number)} has a std below 0: is it a log-variance?")


class Sharded(Foreign):
    """Latents in files one after the other."""

    _starts: np.ndarray
    """The number of the first latent of each file, and that of all."""

    def file(self, number: int) -> int:
        return int(np.searchsorted(self._starts, number, side="right")) - 1

    def _row_of(self, number: int) -> int:
        return int(number - self._starts[self.file(number)])

    def name(self, number: int) -> str:
        return f"{self._files.names[self.file(number)]}, latent {self._row_of(number)},"


def checksum_of(found: Latents) -> str:
    """SHA-256 of count, shape, scale, shift, classes, all labels, and some rows in float16 with their twins.

    Names and bytes of files are no part of it: the same latents are the same in another format. Raises DataError.
    """
    count, layout = len(found), found.layout
    some = min(count, ROWS_OF_CHECKSUM)
    index = torch.arange(some) * (count - 1) // max(some - 1, 1)
    twins = [found.read(index, torch.ones(some, dtype=torch.bool))] if found.mirrors else []
    text = json.dumps([count, layout.row(), layout.scale, layout.shift, found.contents.classes])
    digest = hashlib.sha256(text.encode())
    digest.update(found.labels.numpy().astype("<i8").tobytes())
    for rows in (found.read(index), *twins):
        digest.update(rows.numpy().astype("<f2").tobytes())
    return digest.hexdigest()


def layout_of(shape: Sequence[int], std: bool, scale: Factor | None = None, shift: Factor = 0.0) -> Layout:
    """The layout of rows [2C or C, H, W]. scale: None stands for that of SD's VAE at 4 channels, else for 1."""
    stored, height, width = shape
    channels = stored // 2 if std else stored
    known = (SD_SCALE if channels == 4 else 1.0) if scale is None else scale
    return Layout(channels, height, width, std, known, shift)


def said_of(layout: Layout) -> list[str]:
    """Notes on how latents are taken, where the format does not say."""
    parts = "mean || std" if layout.std else "samples or means"
    return [f"latents taken as {parts} of {layout.channels} channels, scale {layout.scale}"]


def has_std(first: np.ndarray, wanted: Wanted) -> bool:
    """Whether a row [2C or C, H, W] is mean || std, as `latent_formats.load` says."""
    if wanted.channels:
        return len(first) == 2 * wanted.channels
    return len(first) % 2 == 0 and bool((first[len(first) // 2 :] >= 0).all())
