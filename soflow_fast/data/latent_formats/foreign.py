"""What formats share: rows that are read one by one and checked, a scale where no file says it, .npy in memory."""

import abc
import ast
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError
from ..dataset import Contents, Wanted, by_name, checksum
from ..latents.layout import SD_SCALE, Factor, Latents, Layout, check_labels, check_wanted, damage, in_words

LARGEST_FILE = 64 * 2**20
"""Bytes of one latent, unpacked."""
LARGEST_JSON = 2**29
LOGVAR = (-30.0, 20.0)
"""To what a log-variance is clipped, as in diffusers' and latent-diffusion's DiagonalGaussianDistribution."""


class Foreign(Latents):
    """Latents that a subclass reads by number."""

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

    def read(self, index: Tensor, mirrored: Tensor | None = None) -> Tensor:
        """float16 [n, 2C, H, W] or [n, C, H, W]. Raises DataError that names what is damaged."""
        out = np.empty((len(index), *self.layout.row()), np.float16)
        flags = mirrored.tolist() if mirrored is not None else [False] * len(index)
        if not self.mirrors and any(flags):
            raise DataError(f"--data {self.place}: there are no latents of mirrored images")
        numbers = index.tolist()
        for at in sorted(range(len(numbers)), key=numbers.__getitem__):  # in the order of the files
            with damage(self.place, self.name(numbers[at])), np.errstate(over="ignore"):
                row = self.row(numbers[at], flags[at])
                if row.shape != out.shape[1:]:
                    got, wanted = in_words(row.shape), in_words(out.shape[1:])
                    raise DataError(f"--data {self.place}: {self.name(numbers[at])} is {got}, not {wanted}")
                out[at] = row
        self._check(numbers, torch.from_numpy(out))
        return torch.from_numpy(out)

    def _check(self, numbers: list[int], rows: Tensor) -> None:
        finite = torch.isfinite(rows).flatten(1).all(1)
        if not finite.all():
            number = numbers[int(finite.logical_not().nonzero()[0])]
            raise DataError(f"--data {self.place}: {self.name(number)} is not finite in float16")
        if self.layout.std:
            negative = (rows[:, self.layout.channels :] < 0).flatten(1).any(1)
            if negative.any():
                number = numbers[int(negative.nonzero()[0])]
                raise DataError(f"--data {self.place}: {self.name(number)} has a std below 0: is it a log-variance?")


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


def with_std(moments: np.ndarray) -> np.ndarray:
    """mean || std of mean || log-variance, [2C, H, W]."""
    mean, logvar = np.split(moments.astype(np.float32), 2)
    return np.concatenate([mean, np.exp(0.5 * logvar.clip(*LOGVAR))])


def three_axes(row: np.ndarray) -> np.ndarray:
    """[2C, H, W] of it with any number of axes of length 1 before. Raises ValueError."""
    while row.ndim > 3 and row.shape[0] == 1:
        row = row[0]
    if row.ndim != 3 or row.dtype.kind != "f":
        raise ValueError(f"holds {row.dtype} {row.shape}, no latent [C, H, W]")
    return row


def from_npy(content: bytes) -> np.ndarray:
    """The array of a .npy file, whose length must be what its header says. Raises ValueError."""
    if content[:6] != b"\x93NUMPY" or len(content) < 12:
        raise ValueError("is no .npy file")
    wide = content[6] > 1
    start = 12 if wide else 10
    stop = start + int.from_bytes(content[8:start], "little")
    try:
        header = ast.literal_eval(content[start : min(stop, 10_000)].decode("latin1"))
        dtype, shape, fortran = np.dtype(header["descr"]), header["shape"], header["fortran_order"]
        right = dtype.kind in "fiu" and all(type(size) is int and size >= 0 for size in shape)
    except (SyntaxError, ValueError, TypeError, KeyError, MemoryError, RecursionError):
        raise ValueError("has a damaged .npy header") from None
    if not right or len(content) - stop != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"has {len(content)} bytes, which is not {dtype} {shape}")
    return np.frombuffer(content, dtype, offset=stop).reshape(shape, order="F" if fortran else "C")


def numbered(labels: Iterable[int]) -> Tensor:
    """Labels as int64 [n]. Raises ValueError if they are no whole numbers."""
    values = list(labels)
    if not all(type(value) is int and -(2**62) < value < 2**62 for value in values):
        raise ValueError("has labels that are no whole numbers")
    return torch.tensor(values, dtype=torch.int64)


def files_below(place: Path, suffixes: tuple[str, ...], most: int | None = None) -> list[tuple[str, int]]:
    """Names, with / between folders, and bytes of the files below a folder with one of some suffixes, by their names.

    Names that are numbers are in the order of the numbers. most: is no more looked at than so many entries. Raises
    OSError.
    """
    found: list[tuple[str, int]] = []
    waiting, seen = [""], 0
    while waiting and (most is None or seen < most):
        inside = waiting.pop()
        with os.scandir(place / inside) as entries:
            for entry in entries:
                seen += 1
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(f"{inside}{entry.name}/")
                elif entry.name.endswith(suffixes) and entry.is_file():
                    found.append((f"{inside}{entry.name}", entry.stat().st_size))
                if most is not None and seen >= most:
                    break
    return sorted(found, key=lambda item: [by_name(part.rpartition(".")[0] or part) for part in item[0].split("/")])


def checksum_of(names: Iterable[tuple[str, int]], labels: Tensor) -> str:
    """Of files, names and bytes, and labels."""
    pairs = list(names)
    return checksum((name for name, _ in pairs), np.array([size for _, size in pairs], np.int64), labels)


def starts_with(path: Path, magic: bytes) -> bool:
    """Whether a file begins with some bytes."""
    try:
        if not path.is_file():  # the opening of a pipe waits for a writer
            return False
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except (OSError, ValueError):
        return False
