"""Data sets of Hugging Face on disk: a folder of `Dataset.save_to_disk`, or parquet files with images in them.

Needs the package `datasets` (https://huggingface.co/docs/datasets), which keeps the images in Arrow files that are
mapped into memory; those of parquet it writes first, into its cache folder.
"""

import importlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import DataError, printable
from ..files import TEXT, read_file
from ._arrays import reason
from .dataset import Dataset, Wanted, by_name

IMAGES = ("image", "img")
LABELS = ("label", "labels", "fine_label", "class", "cls")
"""Columns, most wanted first."""
SPLITS = {"train", "test", "validation", "valid", "val", "dev", "eval"}
LARGEST_LABEL = 99_999
BLOCK = 1000
"""Rows whose labels are read at a time."""


class Rows(Sequence[str]):
    """Names for rows."""

    def __init__(self, count: int) -> None:
        self._numbers = range(count)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, number: Any) -> Any:
        found = self._numbers[number]
        return [f"row {i}" for i in found] if isinstance(found, range) else f"row {found}"


class RowFiles:
    """The encoded images of a column, by their rows. view: the data set in the format "arrow", which is not decoded."""

    def __init__(self, view: Any, column: str, sizes: np.ndarray) -> None:
        self._view, self._column = view, column
        self.names, self.sizes = Rows(len(sizes)), sizes

    def read(self, number: int) -> bytes:
        return self._view[number].column(self._column)[0].as_py()["bytes"]


def recognises(place: Path) -> bool:
    """Whether it is a saved data set, a parquet file or a folder with parquet files, or with such a folder."""
    try:
        if place.is_file():
            return _is_parquet(place)
        saved = (place / "dataset_info.json").is_file() and (place / "state.json").is_file()
        return saved or (place / "dataset_dict.json").is_file() or any(map(_is_parquet, _parquet_files(place)))
    except (OSError, ValueError):
        return False


def load(place: Path, wanted: Wanted) -> Dataset:
    """The images of a data set that has one split, with the labels of its column of that name, if it has one.

    Raises DataError if the package is missing, for splits side by side, for columns that are missing or not images,
    and for whatever the package cannot read.
    """
    from .images import image_set

    where = f"--data {place}"
    try:
        package = importlib.import_module("datasets")
        compute = importlib.import_module("pyarrow.compute")
    except ImportError:
        raise DataError(f"{where}: a data set of Hugging Face needs a package: pip install datasets") from None
    try:
        with _quiet(package):
            found, kind, notes, stamp = _opened(package, place, where, wanted)
            image, label = _columns(package, found.features, where)
            view = found.with_format("arrow")
            sizes, labels = _rows(view, image, label, compute, where)
    except DataError:
        raise
    except Exception as error:  # it and Arrow raise many kinds; all mean that something is damaged
        text = " ".join(reason(error).split())[:200]
        raise DataError(f"{where}: cannot be read by `datasets` ({type(error).__name__}: {text})") from None
    if not len(sizes):
        raise DataError(f"{where}: holds no images")
    numbers, classes = _classes(labels, found.features.get(label), where) if label else ([0] * len(sizes), ())
    if label and label != LABELS[0]:
        notes.append(f"the labels are those of the column {printable(label)}")
    if not classes:
        notes.append("no sample has a label")
    return image_set(
        RowFiles(view, image, sizes),
        torch.tensor(numbers, dtype=torch.int64),
        classes,
        wanted,
        kind=kind,
        left_out=Counter(),
        notes=notes,
        where=str(place),
        stamp=stamp,
    )


@contextmanager
def _quiet(package: Any) -> Iterator[None]:
    """Within it the package shows no bars and logs no errors beside the one that it raises."""
    before = package.logging.get_verbosity()
    bars = package.is_progress_bar_enabled()
    package.logging.set_verbosity(logging.CRITICAL)
    package.disable_progress_bars()
    try:
        yield
    finally:
        package.logging.set_verbosity(before)
        if bars:
            package.enable_progress_bars()


def _opened(package: Any, place: Path, where: str, wanted: Wanted) -> tuple[Any, str, list[str], str]:
    """The data set, its kind, what is to be said of it, and what changes when its files do."""
    if place.is_dir() and (place / "dataset_dict.json").is_file():
        splits = _json(place / "dataset_dict.json", where).get("splits")
        if not isinstance(splits, list) or not splits or not all(_is_plain(split) for split in splits):
            raise DataError(f"{where}: dataset_dict.json names no splits")
        if len(splits) > 1:
            names = ", ".join(map(printable, splits))
            raise DataError(f"{where}: holds the splits {names}: name one of them, as {place / str(splits[0])}")
        place /= str(splits[0])
    if place.is_dir() and (place / "state.json").is_file():
        listed = _json(place / "state.json", where).get("_data_files")
        named = [file.get("filename") if isinstance(file, dict) else None for file in listed or []]
        if not all(_is_plain(name) for name in named):
            raise DataError(f"{where}: state.json names a file that is not in the folder")
        files = [place / str(name) for name in named]
        found = package.load_from_disk(str(place))
        return found, "data set of Hugging Face", [], _stamp(files)
    files = [place] if place.is_file() else _of_one_split(_parquet_files(place), place, where)
    if not files:
        raise DataError(f"{where}: holds no data set of Hugging Face")
    many = "1 parquet file" if len(files) == 1 else f"{len(files)} parquet files"
    wanted.say(f"reading {many}")
    found = package.Dataset.from_parquet([str(file) for file in files])
    return found, many, ["its images are kept in the cache folder of `datasets` too"], _stamp(files)


def _stamp(files: list[Path]) -> str:
    return repr([(file.name, (about := file.stat()).st_size, about.st_mtime_ns) for file in files])


def _json(file: Path, where: str) -> dict[str, Any]:
    try:
        found = json.loads(read_file(file, TEXT, follow=True))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{where}: {file.name} cannot be read ({reason(error)})") from None
    if not isinstance(found, dict):
        raise DataError(f"{where}: {file.name} holds no object")
    return found


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name and "\0" not in name


def _is_parquet(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(4) == b"PAR1"


def _parquet_files(folder: Path) -> list[Path]:
    """Those in a folder, or else those in its folders that are called as a split, or `data`."""
    inner = (folder / name / "*.parquet" for name in sorted({"data", *SPLITS}))
    found = sorted(folder.glob("*.parquet")) or [file for path in inner for file in sorted(path.parent.glob(path.name))]
    return [file for file in found if file.is_file()]


def _of_one_split(files: list[Path], place: Path, where: str) -> list[Path]:
    """The files, unless their names or folders say that they are of several splits."""

    def split(file: Path) -> str:
        inner = file.parent.name if file.parent != place else ""
        start = re.split(r"[-_.0-9]", file.name)[0]
        return inner if inner in SPLITS else start

    names = sorted({split(file) for file in files})
    if len(names) > 1 and SPLITS & set(names):
        raise DataError(
            f"{where}: holds the splits {', '.join(map(printable, names))}: name one of them, a folder of its files"
        )
    return files


def _columns(package: Any, features: Any, where: str) -> tuple[str, str]:
    """The column of images, and that of labels or ""."""
    images = [
        name
        for name, kind in features.items()
        if isinstance(kind, package.Image) or (isinstance(kind, dict) and {"bytes", "path"} <= kind.keys())
    ]
    image = next((name for name in IMAGES if name in images), images[0] if len(images) == 1 else "")
    if not image:
        names = ", ".join(printable(name) for name in images or features)
        what = "several columns of images" if images else "no column of images, but"
        raise DataError(f"{where}: has {what} ({names[:200]})")
    named = [name for name, kind in features.items() if isinstance(kind, package.ClassLabel)]
    label = next((name for name in LABELS if name in features), named[0] if len(named) == 1 else "")
    return image, label


def _rows(view: Any, image: str, label: str, compute: Any, where: str) -> tuple[np.ndarray, list[Any]]:
    """Bytes of each image, and labels, if there are any."""
    sizes = np.empty(len(view), np.int64)
    labels: list[Any] = []
    for start in range(0, len(view), BLOCK):
        table = view[start : start + BLOCK].select([image, label] if label else [image])
        table.validate(full=True)  # Arrow follows offsets out of its memory otherwise
        lengths = compute.binary_length(compute.struct_field(table.column(image), "bytes")).to_pylist()
        for i, length in enumerate(lengths):
            if length is None:
                raise DataError(f"{where}: row {start + i} holds no image, or only the path of one")
        sizes[start : start + len(lengths)] = lengths
        if label:
            labels += table.column(label).to_pylist()
    return sizes, labels


def _classes(labels: list[Any], feature: Any, where: str) -> tuple[list[int], tuple[str, ...]]:
    """Labels as numbers, and the names of the classes; none, if no row has a label."""
    missing = [row for row, label in enumerate(labels) if label is None or label == -1]
    if len(missing) == len(labels):
        return [0] * len(labels), ()
    if missing:
        raise DataError(f"{where}: row {missing[0]} has no label, others have one")
    if all(isinstance(label, str) for label in labels):
        classes = tuple(sorted(set(labels), key=by_name))
        number = {name: i for i, name in enumerate(classes)}
        return [number[label] for label in labels], tuple(map(printable, classes))
    names = tuple(printable(str(name)) for name in getattr(feature, "names", None) or ())
    most = len(names) - 1 if names else LARGEST_LABEL
    for row, label in _bad(labels, most):
        raise DataError(f"{where}: row {row} has the label {printable(repr(label))[:40]}, not one of 0..{most}")
    return labels, names or tuple(map(str, range(max(labels) + 1)))


def _bad(labels: list[Any], most: int) -> Iterator[tuple[int, Any]]:
    return ((row, label) for row, label in enumerate(labels) if type(label) is not int or not 0 <= label <= most)
