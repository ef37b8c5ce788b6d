"""Vectors in the place of labels, from a file beside the samples: by the samples' names, or in their order.

    conditions.npz    names [M], text: paths of images in the folder or zip, such as "cats/1.png"; vectors [M, E]
    conditions.npy    vectors [N, E] in the order of the samples, for data whose samples are no files

Vectors are float16 or float32.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, printable
from ..files import regular_file

BY_NAME, IN_ORDER = "conditions.npz", "conditions.npy"
FLAG = "--conditions"
LARGEST = 2**44
"""Bytes that a file may have: it is mapped, or holds what lies in memory anyway."""
BYTES_AT_A_TIME = 2**26


class Vectors(NamedTuple):
    """What a file holds."""

    path: Path
    values: np.ndarray
    """float16 or float32 [M, E]; of a .npy in mapped memory."""
    names: np.ndarray | None
    """Text [M]; None: they are in an order that says whose they are."""

    @property
    def size(self) -> int:
        """E."""
        return self.values.shape[1]

    def error(self, what: str) -> DataError:
        """What is wrong with the file, by its flag and path."""
        return DataError(f"{FLAG} {self.path}: {what}")


def read_vectors(path: Path) -> Vectors:
    """The vectors of a .npz or .npy, whose numbers are not looked at yet. Nothing in it is run. Raises DataError."""
    try:
        with regular_file(path, LARGEST, follow=True) as file:
            beginning = file.read(6)
            file.seek(0)
            if beginning.startswith(b"PK"):
                names, values = _named(path, file)
            elif beginning.startswith(b"\x93NUMPY"):
                names, values = None, np.load(path, mmap_mode="c", allow_pickle=False)
            else:
                raise DataError(f"{FLAG} {path}: is neither .npz nor .npy")
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{FLAG} {path}: {error.strerror or error}") from None
    except Exception as error:  # numpy and zipfile raise many kinds for a file that is damaged
        text = " ".join(str(error).split())[:200]
        raise DataError(f"{FLAG} {path}: cannot be read ({printable(text) or type(error).__name__})") from None
    vectors = Vectors(path, values, names)
    shape = " x ".join(map(str, values.shape)) or "one number"
    if values.ndim != 2 or values.dtype not in (np.float16, np.float32) or 0 in values.shape:
        raise vectors.error(f"must be vectors, float16 or float32 [M, E], they are {values.dtype}, {shape}")
    if names is not None and (names.ndim != 1 or names.dtype.kind != "U" or len(names) != len(values)):
        count = " x ".join(map(str, names.shape))
        raise vectors.error(f"must have one name, text, for each of {len(values)} vectors, got {names.dtype}, {count}")
    return vectors


def _named(path: Path, file: BinaryIO) -> tuple[np.ndarray, np.ndarray]:
    """Names and vectors of a .npz that is open: of a damaged one that it opens itself, numpy would leave it open."""
    with np.load(file, allow_pickle=False) as found:
        for name in ("names", "vectors"):
            if name not in found.files:
                has = ", ".join(map(printable, found.files[:4])) or "nothing"
                raise DataError(f"{FLAG} {path}: must hold names and vectors, it has {has}")
        return found["names"], found["vectors"]


def first_not_finite(values: np.ndarray) -> int | None:
    """The first row of vectors [M, E] that holds a number which is not finite; None: there is none."""
    for at, part in _parts(values, None):
        wrong = np.flatnonzero(~np.isfinite(part).all(1))
        if len(wrong):
            return at + int(wrong[0])
    return None


class Conditions:
    """The vector of each sample of a data set, by the number of the sample."""

    def __init__(self, vectors: Vectors, order: np.ndarray | None = None) -> None:
        """order: int64 [N], the rows of the samples; None: row i is of sample i. Raises DataError for a vector that is
        not finite."""
        self._vectors, self._order = vectors, order
        self._mark = _mark(vectors.path)
        wrong = first_not_finite(vectors.values)
        if wrong is not None:
            of = f"row {wrong}" if vectors.names is None else printable(str(vectors.names[wrong]))
            raise vectors.error(f"the vector of {of} is not finite")
        digest = hashlib.sha256(f"{self.dtype} {len(self)} {self.size}\n".encode())
        for part in self.parts():
            digest.update(part.data)
        self.checksum = digest.hexdigest()
        """Of the numbers in the order of the samples."""

    def __len__(self) -> int:
        return len(self._vectors.values if self._order is None else self._order)

    @property
    def path(self) -> Path:
        """The file."""
        return self._vectors.path

    @property
    def size(self) -> int:
        """Numbers of a vector, E."""
        return self._vectors.size

    @property
    def dtype(self) -> np.dtype:
        """float16 or float32."""
        return self._vectors.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return len(self) * self.size * self.dtype.itemsize

    def rows(self, index: Tensor) -> Tensor:
        """The vectors of some samples, int64 [n], as they are stored, [n, E]. Raises DataError for a file that is not
        as it was at the start: what is mapped of one that was cut off would end the process."""
        if self._vectors.names is None and _mark(self.path) != self._mark:
            raise self._vectors.error("has changed during the run")
        numbers = index.numpy() if self._order is None else self._order[index.numpy()]
        return torch.from_numpy(np.array(self._vectors.values[numbers]))

    def some(self, n: int) -> Tensor:
        """Those of n samples, or of all if there are fewer, evenly spread over the set, [at most n, E]."""
        n = min(n, len(self))
        return self.rows(torch.arange(n) * len(self) // n)

    def parts(self) -> Iterator[np.ndarray]:
        """All of them in the order of the samples, some rows at a time."""
        return (np.ascontiguousarray(part) for _, part in _parts(self._vectors.values, self._order))


def _parts(values: np.ndarray, order: np.ndarray | None) -> Iterator[tuple[int, np.ndarray]]:
    """Rows [n, E] in an order, with the place of the first of them."""
    at_a_time = max(1, BYTES_AT_A_TIME // (values.shape[1] * values.dtype.itemsize))
    for at in range(0, len(values) if order is None else len(order), at_a_time):
        rows = slice(at, at + at_a_time)
        yield at, values[rows] if order is None else values[order[rows]]


def _mark(path: Path) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"{FLAG} {path}: {error.strerror}") from None
    return status.st_size, status.st_mtime_ns
