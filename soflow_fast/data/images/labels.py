"""The class of each image: what a labels file in the set says, else the name of the first folder that it lies in."""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...errors import DataError, printable
from ..dataset import by_name
from .listing import IMAGES, LABELS, Listing

SPLITS = {"train", "val", "valid", "validation", "test"}
COLUMNS = ("label", "labels", "class")
MOST_CLASSES = 2**20
NUMBER = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?(e[-+]?[0-9]+)?", re.IGNORECASE)
"""In a CSV, where all is text; as in JSON, a column of numbers holds those of classes."""
LONGEST_NUMBER = 1000
"""Digits of a class's name beyond which it is sorted as a text: Python reads no longer numbers than 4300."""

Labels = dict[str, Any]
"""What a labels file says of each image, by its path from the file's folder: a number or a name."""


class _NotUnderstood(Exception):
    """What is wrong with a labels file, in words that follow its name."""


def classes_of(found: Listing, where: str) -> tuple[Tensor, tuple[str, ...], str]:
    """Labels, int64 [N], the classes' names, and the folder that all lies in: "" or a wrapper.

    Raises DataError, with `where` in it, for what cannot be told.
    """
    images_in = Counter(name.rpartition("/")[0] for name in found.names)
    if not images_in:
        raise DataError(f"--data {where}: holds no images ({', '.join(sorted(IMAGES))})")
    below: dict[str, list[str]] = {}
    for folder in sorted(found.folders):
        below.setdefault(folder.rpartition("/")[0], []).append(folder)
    root = _root(found, images_in, below)
    folders = below.get(root, [])
    splits = [folder for folder in folders if _last(folder).lower() in SPLITS]
    if len(splits) > 1:
        first, second = (printable(folder) for folder in splits[:2])
        hint = "a zip of one of them is needed" if found.kind.startswith("zip") else f"name one, --data {where}/{first}"
        raise DataError(f"--data {where}: holds {first} and {second} side by side: {hint}")
    files = [file for file in sorted(found.labels) if file.rpartition("/")[0] == root]
    lost = [file for file in found.labels if file not in files and _last(file).lower() != "dataset.json"]
    if len(files) > 1:
        raise DataError(f"--data {where}: both {printable(files[0])} and {printable(files[1])} say the classes")
    if lost:
        raise DataError(f"--data {where}: {printable(lost[0])} is not understood: it lies below the images' folder")
    found.left_out[".json"] += sum(file not in files for file in found.labels)
    found.left_out += Counter()  # without those that are 0
    if files:
        return *_labelled(found, files[0], where), root
    if not folders:
        return torch.zeros(len(found.names), dtype=torch.int64), (), root
    if images_in[root]:
        beside = next(name for name in found.names if name.rpartition("/")[0] == root)
        raise DataError(f"--data {where}: {printable(beside)} lies beside the classes' folders, in none of them")
    _refuse_empty(folders, images_in, where)
    classes = {folder: number for number, folder in enumerate(sorted(folders, key=lambda f: _by_name(_last(f))))}
    start = len(root) + 1 if root else 0
    ends = ((name, name.index("/", start)) for name in found.names)
    labels = torch.tensor([classes[name[:end]] for name, end in ends], dtype=torch.int64)
    return labels, tuple(map(_last, classes)), root


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def _by_name(name: str) -> Any:
    return by_name(name) if len(name) <= LONGEST_NUMBER else (1, 0, name)


def _root(found: Listing, images_in: Counter[str], below: dict[str, list[str]]) -> str:
    """The folder of the classes: what a folder that holds nothing but one folder with folders is wrapped around."""
    with_labels = {file.rpartition("/")[0] for file in found.labels}
    root = ""
    while True:
        folders = below.get(root, [])
        if len(folders) != 1 or images_in[root] or root in with_labels:
            return root
        if folders[0] not in below and folders[0] not in with_labels:
            return root
        root = folders[0]


def _refuse_empty(folders: Iterable[str], images_in: Counter[str], where: str) -> None:
    filled = set()
    for folder in images_in:
        while folder and folder not in filled:
            filled.add(folder)
            folder = folder.rpartition("/")[0]
    for folder in folders:
        if folder not in filled:
            raise DataError(f"--data {where}: {printable(folder)} is a class without an image")


def _labelled(found: Listing, file: str, where: str) -> tuple[Tensor, tuple[str, ...]]:
    try:
        said = READERS[_last(file).lower()](found.text(file))
    except _NotUnderstood as error:
        raise DataError(f"--data {where}: {printable(file)} is not understood: {error}") from None
    except Exception as error:  # of the disk, the zip, JSON or CSV
        kind = type(error).__name__
        text = printable(" ".join(str(error).split()))[:200]
        raise DataError(f"--data {where}: {printable(file)} is not understood ({kind}: {text})") from None
    if said is None:
        return torch.zeros(len(found.names), dtype=torch.int64), ()
    start, labels = len(file) - len(_last(file)), []
    for name in found.names:
        if name[start:] not in said:
            raise DataError(f"--data {where}: {printable(name)} has no label in {printable(file)}")
        labels.append(said.pop(name[start:]))
    if said:
        raise DataError(
            f"--data {where}: {printable(file)} names {printable(next(iter(said)))}, which is no image of it"
        )
    if isinstance(labels[0], int):
        return torch.tensor(labels, dtype=torch.int64), tuple(map(str, range(max(labels) + 1)))
    numbers = {name: number for number, name in enumerate(sorted(set(labels), key=_by_name))}
    return torch.tensor([numbers[name] for name in labels], dtype=torch.int64), tuple(numbers)


def _checked(pairs: Iterable[tuple[Any, Any]]) -> Labels:
    """Labels that are all numbers of classes or all names of classes, by paths that are each there once."""
    said: Labels = {}
    kinds = set()
    for name, label in pairs:
        if not isinstance(name, str) or not name:
            raise _NotUnderstood(f"{_short(name)} is no file's name")
        name = "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))
        if type(label) not in (int, str) or label == "":
            raise _NotUnderstood(f"the label of {printable(name)} is {_short(label)}, neither a number nor a name")
        if isinstance(label, int) and not 0 <= label < MOST_CLASSES:
            raise _NotUnderstood(f"the label of {printable(name)} is {_short(label)}, not in 0..{MOST_CLASSES - 1}")
        if name in said:
            raise _NotUnderstood(f"{printable(name)} is in it twice")
        said[name] = label
        kinds.add(type(label))
    if len(kinds) > 1:
        raise _NotUnderstood("some labels are numbers and some are names")
    return said


def _short(value: Any) -> str:
    text = printable(repr(value)) if not isinstance(value, int) or value.bit_length() < 999 else "a huge number"
    return text if len(text) < 100 else text[:100] + "..."


def _edm(content: bytes) -> Labels | None:
    """StyleGAN's and EDM's: {"labels": [[path, number], ...]}; null: there are no classes."""
    values = json.loads(content)
    if not isinstance(values, dict) or "labels" not in values:
        raise _NotUnderstood('it has no "labels"')
    pairs = values["labels"]
    if pairs is None:
        return None
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise _NotUnderstood('its "labels" are no pairs of a path and a number')
    return _checked((name, label) for name, label in pairs)


def _jsonl(content: bytes) -> Labels:
    """Hugging Face's: an object with file_name and a label in each line."""
    rows = [json.loads(line) for line in content.decode("utf-8-sig").split("\n") if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise _NotUnderstood("a line of it is no object")
    column = _column(rows[0] if rows else {})
    return _checked((row.get("file_name"), row.get(column)) for row in rows)


def _csv(content: bytes) -> Labels:
    """Hugging Face's: the columns file_name and a label, with a header."""
    table = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
    header = list(table.fieldnames or ())
    column = _column(header)
    for name in ("file_name", column):
        if header.count(name) > 1:
            raise _NotUnderstood(f"it has two columns {name}")
    pairs: list[tuple[str, Any]] = []
    for row in table:
        if None in row:
            raise _NotUnderstood(f"line {table.line_num} has more fields than the header")
        pairs.append((row["file_name"], row[column] and row[column].strip()))
    if not all(label and NUMBER.fullmatch(label) for _, label in pairs):
        return _checked(pairs)
    for name, label in pairs:
        if not label.isdigit():
            raise _NotUnderstood(f"the label of {printable(name)} is {_short(label)}, which is no number of a class")
    return _checked((name, int(label)) for name, label in pairs)


def _column(names: Iterable[str]) -> str:
    names = list(names)
    column = next((column for column in COLUMNS if column in names), "")
    if "file_name" not in names or not column:
        raise _NotUnderstood(f"it has the columns {_short(names)}, and file_name and {' or '.join(COLUMNS)} are needed")
    return column


READERS = {"dataset.json": _edm, "metadata.jsonl": _jsonl, "metadata.csv": _csv}
assert READERS.keys() == LABELS
