"""What every data set is: labels, samples by number, and what it was found to hold. `source.py` makes batches of it."""

import abc
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .conditions import Conditions

Noise = Callable[[tuple[int, ...]], Tensor]
"""Standard normal numbers of a shape [n, ...], one row for each sample of a batch."""


class Wanted(NamedTuple):
    """What a model and a run ask of a data set."""

    size: int
    """Height and width of a sample."""
    channels: int
    resize: bool = False
    """Scale images to the size, sides apart, in place of the centre crop."""
    flip: bool = False
    """Whether samples are to be mirrored now and then."""
    skip_bad: bool = False
    """Leave out samples that cannot be read, in place of raising DataError for the first."""
    say: Callable[[str], None] = lambda text: None
    """Is told, a line at a time, how a check that takes long goes on."""
    vae: str = ""
    """Name or path of the VAE that latents must be of; "": of any."""


class LatentSpace(NamedTuple):
    """How a model's latents x and those of a VAE z belong together: x = (z - shift) scale."""

    vae: str
    """Name or folder; empty: not known."""
    scale: float | tuple[float, ...]
    """For all channels, or for each."""
    shift: float | tuple[float, ...]


BAD = "bad: "
"""Begins the reasons of `Contents.left_out` that name a sample."""


@dataclass
class Contents:
    """What was found at a path."""

    kind: str
    """In words: "folder of images", "CIFAR-10 in binary batches"."""
    classes: tuple[str, ...] = ()
    """The names of the classes by their number; none: there are no labels."""
    left_out: Counter[str] = field(default_factory=Counter)
    """How many files are no samples, by the reason: ".txt", "hidden", "bad: a/b.png is truncated"."""
    notes: list[str] = field(default_factory=list)
    """What is to be said once: "3 animations: the first frame is taken"."""
    checksum: str = ""
    """Of names, sizes and labels, of a manifest, or of latents and labels; the path is no part of it."""
    source: str = ""
    """That of what these latents were converted from, "" if it is not known."""
    space: LatentSpace | None = None
    """Of latents."""
    conditions: str = ""
    """The checksum of the vectors that came with latents; "": none did."""

    def bad(self) -> list[str]:
        """What is wrong with each sample that was left out because it cannot be read, after its name."""
        return [reason.removeprefix(BAD) for reason in self.left_out if reason.startswith(BAD)]


class Dataset(abc.ABC):
    """Samples, numbered from 0."""

    contents: Contents
    labels: Tensor
    """int64 [N]; all 0 where there are no classes."""
    conditions: Conditions | None = None
    """Vectors in the place of labels; None: there are none, or nobody asked for them."""
    names: Sequence[str] | None = None
    """Paths of files in a folder or zip, of samples that are such; None: of others."""
    wrapper: str = ""
    """The folder that all names begin with, which is no part of the identity."""
    numbers: np.ndarray | None = None
    """int64 [N], the samples among all that were found, where some may have been left out; None: none can be."""
    found: int = 0
    """How many were found, where `numbers` says which are samples."""
    shape: tuple[int, int, int]
    """Channels, height and width of a sample as a model takes it."""
    mirrors = True
    """Whether samples can be read mirrored, left for right."""
    copies = False
    """Whether `read` does no more than copy, from memory or from mapped files."""

    def __len__(self) -> int:
        return len(self.labels)

    @abc.abstractmethod
    def read(self, index: Tensor, mirrored: Tensor | None = None) -> Tensor:
        """The samples of some numbers, int64 [n], in as few bytes as may be: uint8 [n, C, H, W] of pixels, say.

        mirrored: bool [n], which of them are mirrored; None: none. A function of its arguments, whichever process
        calls it. Raises DataError naming what cannot be read.
        """

    def decoded(self, raw: Tensor, noise: Noise) -> Tensor:
        """What a model takes, float32 [n, C, H, W], of what `read` returned, on its device: pixels in [-1, 1].

        noise: for samples that are distributions, as latents are. No other randomness is allowed here.
        """
        return raw.float() / 127.5 - 1 if raw.dtype == torch.uint8 else raw

    def given(self, index: Tensor) -> Tensor:
        """What a network is given of some samples, int64 [n]: vectors, as they are stored, [n, E], or labels, int64
        [n]. Raises DataError."""
        return self.labels[index] if self.conditions is None else self.conditions.rows(index)

    def nbytes(self) -> int:
        """Bytes of all that `read` returns without `mirrored`. Raises DataError if a sample cannot be read."""
        return self.read(torch.tensor([0])).nbytes * len(self)


class Unreadable(OSError):
    """What is wrong with a sample's file, in words that follow its name."""


class Files(Protocol):
    """Encoded samples by number: the files of a folder, the members of an archive."""

    names: Any
    """A sequence of their names, with / between folders, in the order of their numbers."""
    sizes: Any
    """Bytes of each, as an int64 array."""

    def read(self, number: int) -> bytes:
        """The content. Raises OSError, or what a library raises of damage; in any process."""
        ...


class Format(Protocol):
    """A module that knows one kind of data set."""

    def recognises(self, place: Path) -> bool:
        """Whether what is at a path is of this kind, by its content; soon said, and never an error."""
        ...

    def load(self, place: Path, wanted: Wanted) -> Dataset:
        """The data set. Raises DataError, which begins with `--data PATH: `, for what is wrong with it."""
        ...


def checksum(names: Iterable[str], sizes: np.ndarray, labels: Tensor) -> str:
    """Of samples by their names, bytes and labels."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
    digest.update(np.ascontiguousarray(sizes, dtype="<i8").tobytes())
    digest.update(labels.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def by_name(name: str) -> tuple[Any, ...]:
    """Sort key of classes: names that are numbers as numbers and before the others, the others by their text."""
    return (0, int(name), name) if name.isascii() and name.isdigit() else (1, 0, name)
