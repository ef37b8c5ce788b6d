"""MNIST (LeCun et al. 1998) and sets in its form, as Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747): idx files.

An idx file of bytes (http://yann.lecun.com/exdb/mnist) is two zeros, 8 for "unsigned byte", the number of dimensions,
their lengths as big-endian 32-bit numbers, and the bytes. Files may be packed with gzip.
"""

import gzip
import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, printable
from ._arrays import array_set, looked_through, reason
from .dataset import Dataset, Wanted

LARGEST = 2**30
"""Bytes that a file may unpack to."""
DIGITS = tuple("0123456789")
FOLDERS = {"MNIST", "FashionMNIST", "raw"}
"""As torchvision calls them, one in the other."""
CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def recognises(place: Path) -> bool:
    """Whether it is a folder with a file of images, or one such file, or the labels of one."""
    try:
        place = looked_through(place, FOLDERS)
        if place.is_dir():
            return any(file.is_file() for part in ("train", "t10k") for file in _candidates(place, part, "images", 3))
        if not place.is_file():
            return False
        with _opened(place) as file:
            return file.read(4) in (b"\0\0\x08\x03", b"\0\0\x08\x01")
    except (OSError, EOFError, zlib.error):
        return False


def load(place: Path, wanted: Wanted) -> Dataset:
    """Images in gray with ten classes. Of a folder the training images are taken, if it has them.

    Raises DataError for files that are missing, cut off, too long or no idx files, and for labels out of range.
    """
    where = f"--data {place}"
    try:
        images, labels, notes = _files(looked_through(place, FOLDERS), where)
        pixels, numbers = _array(images, 3, where), _array(labels, 1, where)
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({reason(error)})") from None
    fashion = "fashion" in "".join(images.resolve().parts[-3:-1]).lower()
    classes = CLOTHES if fashion else DIGITS
    if wanted.flip and not fashion:
        notes.append("digits are mirrored: --set data.flip=false leaves them as they are")
    kind = "Fashion-MNIST in idx files" if fashion else "MNIST in idx files"
    return array_set(pixels[..., None], numbers, classes, wanted, kind=kind, notes=notes, where=where)


def _candidates(folder: Path, part: str, what: str, dimensions: int) -> Iterator[Path]:
    for dot in "-.":
        for packed in ("", ".gz"):
            yield folder / f"{part}-{what}{dot}idx{dimensions}-ubyte{packed}"


def _files(place: Path, where: str) -> tuple[Path, Path, list[str]]:
    """The file of images, that of labels, and what is to be said of the choice."""
    if place.is_dir():
        found = {
            (part, what): file
            for part in ("train", "t10k")
            for what, dimensions in (("images", 3), ("labels", 1))
            for file in reversed([*_candidates(place, part, what, dimensions)])
            if file.is_file()
        }
        part = "train" if ("train", "images") in found else "t10k"
        if (part, "images") not in found:
            raise DataError(f"{where}: train-images-idx3-ubyte is missing")
        if (part, "labels") not in found:
            raise DataError(f"{where}: {part}-labels-idx1-ubyte is missing")
        notes = []
        if part == "t10k":
            notes.append("there are no training images: those of t10k are taken")
        elif ("t10k", "images") in found:
            notes.append("the training images are taken; those of t10k are not")
        return found[part, "images"], found[part, "labels"], notes
    if "images" not in place.name:
        raise DataError(f"{where}: is no file of images: name one, as train-images-idx3-ubyte, or its folder")
    beside = place.name.replace("images", "labels").replace("idx3", "idx1").removesuffix(".gz")
    for file in (place.with_name(beside), place.with_name(f"{beside}.gz")):
        if file.is_file():
            return place, file, []
    raise DataError(f"{where}: {printable(beside)} is missing beside it")


def _opened(file: Path) -> Any:
    with file.open("rb") as opened:
        packed = opened.read(2) == b"\x1f\x8b"
    return gzip.open(file) if packed else file.open("rb")


def _array(file: Path, dimensions: int, where: str) -> np.ndarray:
    """uint8 of so many dimensions, of a file that has neither less nor more."""
    name = printable(file.name)
    try:
        with _opened(file) as opened:
            head = opened.read(4 + 4 * dimensions)
            if head[:4] != bytes([0, 0, 8, dimensions]) or len(head) < 4 + 4 * dimensions:
                raise DataError(f"{where}: {name} is no idx file of bytes in {dimensions} dimensions")
            sides = struct.unpack(f">{dimensions}I", head[4:])
            length = math.prod(sides)
            if not 0 < length <= LARGEST:
                raise DataError(f"{where}: {name} says that it is {' x '.join(map(str, sides))} bytes")
            content = opened.read(length + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{where}: {name} is cut off or damaged ({reason(error)})") from None
    if len(content) != length:
        more = "more" if len(content) > length else len(content)
        raise DataError(f"{where}: {name} says that it has {length} bytes, and has {more}")
    return np.frombuffer(content, np.uint8).reshape(sides)
