"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) as their authors give them: batches in binary or pickled, or their tar.gz.

The formats are those of https://www.cs.toronto.edu/~kriz/cifar.html. A binary record of CIFAR-10 is a label and 3072
pixels, one of CIFAR-100 a coarse label, a fine one and 3072 pixels: red, green and blue planes of 32 x 32. A pickled
batch is a dictionary of `data`, uint8 [N, 3072], and `labels` or `fine_labels`. Of CIFAR-100 the fine labels are taken.
"""

import gzip
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from ..errors import DataError, printable
from ..files import read_file
from ._arrays import array_set, looked_through, reason
from ._pickled import read_pickle
from .dataset import Dataset, Wanted

PIXELS = 3 * 32 * 32
LARGEST = 2**30
"""Bytes that a batch, or an archive of them unpacked, may have; the largest of the authors' have 180 MB."""

TEN = "airplane automobile bird cat deer dog frog horse ship truck"
HUNDRED = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""
CIFAR10, CIFAR100 = tuple(TEN.split()), tuple(HUNDRED.split())


class Layout(NamedTuple):
    """One of the four forms."""

    name: str
    pickled: bool
    classes: tuple[str, ...]
    folder: str
    """As it is called in the authors' archive."""
    train: tuple[str, ...]
    test: str
    meta: str
    """Has the names of the classes."""

    @property
    def kind(self) -> str:
        return f"{self.name} in {'pickled' if self.pickled else 'binary'} batches"

    @property
    def heads(self) -> int:
        """Bytes before the pixels of a binary record; the last of them is the label."""
        return 1 if self.name == "CIFAR-10" else 2


FIVE = tuple(f"data_batch_{i}" for i in range(1, 6))
FIVE_BIN = tuple(f"{name}.bin" for name in FIVE)
LAYOUTS = (
    Layout("CIFAR-10", False, CIFAR10, "cifar-10-batches-bin", FIVE_BIN, "test_batch.bin", "batches.meta.txt"),
    Layout("CIFAR-10", True, CIFAR10, "cifar-10-batches-py", FIVE, "test_batch", "batches.meta"),
    Layout("CIFAR-100", False, CIFAR100, "cifar-100-binary", ("train.bin",), "test.bin", "fine_label_names.txt"),
    Layout("CIFAR-100", True, CIFAR100, "cifar-100-python", ("train",), "test", "meta"),
)

FOLDERS = {layout.folder for layout in LAYOUTS}


def recognises(place: Path) -> bool:
    """Whether it is a folder of such batches, one of them, or the authors' archive."""
    try:
        return _layout_of(looked_through(place, FOLDERS)) is not None
    except (OSError, EOFError, ValueError, zlib.error, tarfile.TarError):
        return False


def load(place: Path, wanted: Wanted) -> Dataset:
    """Images of 32 x 32 in colour. Of a folder or an archive that has both, the training images are taken.

    Raises DataError for batches that are missing, cut off or no batches, and for labels out of range.
    """
    where = f"--data {place}"
    try:
        place = looked_through(place, FOLDERS)
        layout = _layout_of(place)
    except (OSError, EOFError, ValueError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"{where}: cannot be read ({reason(error)})") from None
    if layout is None:
        raise DataError(f"{where}: holds no batches of CIFAR-10 or CIFAR-100")
    files = _files(place, layout, where)
    chosen = layout.train
    notes = []
    if place.is_file() and place.name in files:
        chosen = (place.name,)
    elif not any(name in files for name in layout.train):
        chosen = (layout.test,)
        notes.append(f"there are no training images: those of {layout.test} are taken")
    elif layout.test in files:
        notes.append(f"the training images are taken; those of {layout.test} are not")
    images, labels = [], []
    for name in chosen:
        if name not in files:
            raise DataError(f"{where}: {name} is missing")
        try:
            pixels, numbers = _batch(_content(files[name]), layout)
            _check(numbers, layout)
        except (OSError, ValueError) as error:
            raise DataError(f"{where}: {name} {reason(error)}") from None
        images.append(pixels)
        labels.append(numbers)
    kind = layout.kind + (", in an archive" if place.is_file() and place.name not in files else "")
    classes = _classes(files, layout, where)
    planes = np.concatenate(images) if len(images) > 1 else images[0]
    images.clear()
    pixels = planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return array_set(pixels, np.concatenate(labels), classes, wanted, kind=kind, notes=notes, where=where)


def _layout_of(place: Path) -> Layout | None:
    if place.is_dir():
        found = (layout for layout in LAYOUTS if any(_is_batch(place / name, layout) for name in _names(layout)))
        return next(found, None)
    if not place.is_file():
        return None
    found = (layout for layout in LAYOUTS if place.name in _names(layout) and _is_batch(place, layout))
    return next(found, None) or _archived(place)


def _names(layout: Layout) -> tuple[str, ...]:
    return (*layout.train, layout.test)


def _is_batch(file: Path, layout: Layout) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        head = opened.read(2)
    if layout.pickled:
        return len(head) == 2 and head[0] == 0x80 and 2 <= head[1] <= 5
    if layout.name == "CIFAR-10":
        return True
    named = any((file.parent / f"{kind}_label_names.txt").is_file() for kind in ("fine", "coarse"))
    return named or file.stat().st_size % (layout.heads + PIXELS) == 0


def _archived(place: Path) -> Layout | None:
    """The layout whose folder the first member of a tar.gz is in."""
    with place.open("rb") as opened:
        if opened.read(2) != b"\x1f\x8b":
            return None
        opened.seek(0)
        with gzip.GzipFile(fileobj=opened) as unpacked:
            header = unpacked.read(tarfile.BLOCKSIZE)
    member = PurePosixPath(tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name)
    return next((layout for layout in LAYOUTS if layout.folder == member.parts[0]), None) if member.parts else None


def _files(place: Path, layout: Layout, where: str) -> Mapping[str, Path | bytes]:
    """The files of a layout that are there, by their names."""
    names = (*_names(layout), layout.meta)
    if place.is_dir() or place.name in names:
        folder = place if place.is_dir() else place.parent
        there = {name: folder / name for name in names}
        return {name: file for name, file in there.items() if file.is_file()}
    try:
        return _unpacked(place, names)
    except Exception as error:  # gzip, zlib and tarfile raise many kinds; all mean that the archive is damaged
        raise DataError(f"{where}: cannot be read ({reason(error)})") from None


class _Unpacking:
    """A gzip file whose content may have LARGEST bytes."""

    def __init__(self, file: gzip.GzipFile) -> None:
        self.file, self.left = file, LARGEST

    def read(self, size: int) -> bytes:
        found = self.file.read(min(max(size, 0), self.left + 1))
        self.left -= len(found)
        if self.left < 0:
            raise ValueError(f"unpacks to more than {LARGEST >> 20} MiB")
        return found


def _unpacked(place: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    with gzip.open(place) as file:
        unpacking: Any = _Unpacking(file)
        with tarfile.open(fileobj=unpacking, mode="r|") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                content = archive.extractfile(member) if name in names and member.isreg() else None
                if content:
                    if name in found:
                        raise ValueError(f"{name} is in it twice")
                    found[name] = content.read()
        while unpacking.read(2**20):  # up to the sum at the end
            pass
    return found


def _content(file: Path | bytes) -> bytes:
    return file if isinstance(file, bytes) else read_file(file, LARGEST, follow=True)


def _batch(content: bytes, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [N, 3072] and labels [N]. Raises ValueError."""
    if not layout.pickled:
        record = layout.heads + PIXELS
        if not content or len(content) % record:
            raise ValueError(f"has {len(content)} bytes, not a multiple of {record}: it is cut off or no batch")
        table = np.frombuffer(content, np.uint8).reshape(-1, record)
        return table[:, layout.heads :], table[:, layout.heads - 1].astype(np.int64)
    found = read_pickle(content)
    key = "labels" if layout.name == "CIFAR-10" else "fine_labels"
    pixels, numbers = found.get("data"), found.get(key)
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or pixels.shape[1] != PIXELS:
        raise ValueError(f"holds no `data` of {PIXELS} bytes for each image")
    if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
        raise ValueError(f"holds no `{key}`")
    if len(numbers) != len(pixels):
        raise ValueError(f"holds {len(pixels)} images and {len(numbers)} labels")
    return pixels, np.array([min(max(number, -1), 2**31) for number in numbers], np.int64)


def _check(labels: np.ndarray, layout: Layout) -> None:
    outside = np.flatnonzero((labels < 0) | (labels >= len(layout.classes)))
    if len(outside):
        first = int(outside[0])
        raise ValueError(f"has label {int(labels[first])} at image {first}, not one of 0..{len(layout.classes) - 1}")


def _classes(files: Mapping[str, Path | bytes], layout: Layout, where: str) -> tuple[str, ...]:
    """The names in the file that has them, else those that everybody knows."""
    if layout.meta not in files:
        return layout.classes
    try:
        content = _content(files[layout.meta])
        if layout.pickled:
            found = read_pickle(content).get("label_names" if layout.name == "CIFAR-10" else "fine_label_names")
            names = [n.decode() if isinstance(n, bytes) else n for n in found] if isinstance(found, list) else []
        else:
            names = content.decode().split()
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: {layout.meta} {reason(error)}") from None
    if len(names) != len(layout.classes) or len(set(map(str, names))) < len(names):
        raise DataError(f"{where}: {layout.meta} does not hold the names of {len(layout.classes)} classes")
    return tuple(printable(str(name)) for name in names)
