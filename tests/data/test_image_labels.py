"""Labels files in sets of images: what they mean, and what is refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from pictures import WANTED, folder, picture, refusal, values

from soflow_fast.data.images import load


def edm(*pairs: tuple[str, Any]) -> bytes:
    return json.dumps({"labels": [list(pair) for pair in pairs]}).encode()


def jsonl(**columns: list[Any]) -> bytes:
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return "\n".join(map(json.dumps, rows)).encode() + b"\n\n"


NAMES = ["00000/a.png", "00000/b.png", "00001/c.png"]


def table(header: str, *cells: str, end: str = "\n") -> bytes:
    return "".join(line + end for line in (header, *cells)).encode()


def each(labels: Any, names: list[str] = NAMES) -> bytes:
    """EDM's file, with a label for each name."""
    return edm(*zip(names, labels, strict=True))


def _rows(*labels: str) -> list[str]:
    return [f"{name},{label}" for name, label in zip(NAMES, labels, strict=True)]


DOTTED = [f"{i},./{name}" for i, name in enumerate(NAMES)]
TEXTS = [f'{name},"a, b",{label}' for name, label in zip(NAMES, "yxy", strict=True)]
PETS = jsonl(text=["x"] * 3, file_name=NAMES, label=["dog", "cat", "dog"])
# A labels file and its content; the classes and labels that it means.
LABELLED: dict[str, tuple[str, bytes, str, list[int]]] = {
    "EDM": ("dataset.json", each((1, 0, 2)), "0 1 2", [1, 0, 2]),
    "EDM without classes": ("dataset.json", b'{"labels": null}', "", [0, 0, 0]),
    "EDM of Windows": ("dataset.json", each([0] * 3, [n.replace("/", "\\") for n in NAMES]), "0", [0, 0, 0]),
    "EDM in another order": ("dataset.json", each((2, 0, 1), NAMES[::-1]), "0 1 2", [1, 0, 2]),
    "JSON lines": ("metadata.jsonl", jsonl(file_name=NAMES, label=[2, 0, 1]), "0 1 2", [2, 0, 1]),
    "names": ("metadata.jsonl", PETS, "cat dog", [1, 0, 1]),
    "numbers as names": ("metadata.jsonl", jsonl(file_name=NAMES, labels=["10", "9", "10"]), "9 10", [1, 0, 1]),
    "CSV": ("metadata.csv", table("file_name,label", *(f"{n},{i}" for i, n in enumerate(NAMES))), "0 1 2", [0, 1, 2]),
    "CSV of names": ("metadata.csv", table("\ufefffile_name,text,class", *TEXTS, end="\r\n"), "x y", [1, 0, 1]),
    "CSV with spaces": ("metadata.csv", table("file_name,label", *_rows(" 1", "0 ", "1")), "0 1", [1, 0, 1]),
    "CSV of names with spaces": ("metadata.csv", table("file_name,label", *_rows(" a", "a", "-1")), "-1 a", [1, 1, 0]),
    "capitals": ("DATASET.JSON", each((1, 0, 2)), "0 1 2", [1, 0, 2]),
    "CSV with dots": ("metadata.csv", table("labels,file_name", *DOTTED), "0 1 2", [0, 1, 2]),
}


@pytest.mark.parametrize("wrapped", ["", "wrapper/"])
@pytest.mark.parametrize("case", LABELLED)
def test_labels_in_the_set_win_over_folders(made: Any, case: str, wrapped: str) -> None:
    file, content, classes, labels = LABELLED[case]
    found = load(made({wrapped + name: picture(i) for i, name in enumerate(NAMES)} | {wrapped + file: content}), WANTED)
    assert found.contents.classes == tuple(classes.split()) and found.labels.tolist() == labels
    assert values(found) == [0, 1, 2]
    assert not found.contents.left_out


def test_labels_of_a_flat_set_and_of_one_wrapped_folder(made: Any) -> None:
    files = {"w/x.png": picture(1), "w/y.png": picture(2), "w/dataset.json": edm(("x.png", 1), ("y.png", 0))}
    assert load(made(files), WANTED).labels.tolist() == [1, 0]
    flat = {name[2:]: content for name, content in files.items()}
    assert load(
        made({**files, **flat, "dataset.json": edm(("x.png", 1), ("y.png", 0), ("w/x.png", 3), ("w/y.png", 2))}), WANTED
    ).labels.tolist() == [3, 2, 1, 0]


WRONG_LABELS: dict[str, tuple[str, bytes, str]] = {
    "not JSON": ("dataset.json", b"{", "dataset.json is not understood (JSONDecodeError"),
    "deep": ("dataset.json", b"[" * 100_000, "dataset.json is not understood (RecursionError"),
    "not text": ("dataset.json", b"\xff\xfe\xfa", "dataset.json is not understood (Unicode"),
    "another file": ("dataset.json", b'{"name": "x"}', "dataset.json is not understood: it has no"),
    "a list": ("dataset.json", b"[]", "dataset.json is not understood: it has no"),
    "an object": ("dataset.json", b'{"labels": {"a.png": 1}}', "dataset.json is not understood: its"),
    "triples": ("dataset.json", b'{"labels": [["a.png", 1, 2]]}', "dataset.json is not understood: its"),
    "vectors": ("dataset.json", each([[0.5]] * 3), "the label of 00000/a.png is [0.5]"),
    "true": ("dataset.json", each([True] * 3), "the label of 00000/a.png is True"),
    "negative": ("dataset.json", each([-1] * 3), "the label of 00000/a.png is -1, not in 0..1048575"),
    "huge": ("dataset.json", each([10**1000] * 3), "the label of 00000/a.png is a huge number"),
    "a long number": ("dataset.json", b'{"labels": [["a", ' + b"9" * 9999 + b"]]}", "dataset.json is not understood"),
    "a gap": ("dataset.json", each((0, 0, 2)), "1 is a class without an image"),
    "a far gap": ("dataset.json", each((0, 2, 2**20 - 1)), "1 is a class without an image (1048573 of 1048576"),
    "no path": ("dataset.json", edm((3, 1)), "3 is no file's name"),
    "twice": ("dataset.json", each([0] * 4, [*NAMES, "./00000//a.png"]), "00000/a.png is in it twice"),
    "an image too few": ("dataset.json", each([0] * 2, NAMES[:2]), "00001/c.png has no label in dataset.json"),
    "an image too many": ("dataset.json", each([0] * 4, [*NAMES, "d.png"]), "dataset.json names d.png, which"),
    "climbing": ("dataset.json", each([0] * 4, [*NAMES, "../d.png"]), "dataset.json names ../d.png, which"),
    "mixed": ("metadata.jsonl", jsonl(file_name=NAMES, label=[1, "x", 2]), "some labels are numbers and some"),
    "no label": ("metadata.jsonl", jsonl(file_name=NAMES, text=[1, 2, 3]), "it has the columns"),
    "no name": ("metadata.jsonl", jsonl(name=NAMES, label=[1, 2, 3]), "it has the columns ['name', 'label']"),
    "null": ("metadata.jsonl", jsonl(file_name=NAMES, label=[1, None, 3]), "the label of 00000/b.png is None"),
    "lines of numbers": ("metadata.jsonl", b"1\n2\n", "a line of it is no object"),
    "no lines": ("metadata.jsonl", b"", "metadata.jsonl is not understood"),
    "empty cells": ("metadata.csv", b"file_name,label\n00000/a.png,\n", "the label of 00000/a.png is ''"),
    "short rows": ("metadata.csv", b"file_name,label\n00000/a.png\n", "the label of 00000/a.png is None"),
    "quotes": ("metadata.csv", b'file_name,label\n"x', "metadata.csv is not understood (Error"),
    "zeros": ("metadata.csv", bytes(100), "metadata.csv is not understood"),
    "negative, CSV": ("metadata.csv", table("file_name,label", *_rows("-1", "2", "2")), "a.png is '-1', which is"),
    "whole, CSV": ("metadata.csv", table("file_name,label", *_rows("1.0", "0", "2.0")), "a.png is '1.0', which is"),
    "long rows": ("metadata.csv", table("file_name,label", *_rows("0", "1,5", "2")), "line 3 has more fields than"),
    "two columns": ("metadata.csv", table("file_name,label,label", *_rows("0,1", "1,1", "2,1")), "two columns label"),
    "an empty table": ("metadata.csv", b"", "metadata.csv is not understood: it has the columns []"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_LABELS)
def test_labels_that_are_not_understood_or_do_not_fit(made: Any, case: str) -> None:
    file, content, said = WRONG_LABELS[case]
    text = refusal(made({name: picture() for name in NAMES} | {file: content}))
    assert said in text and (file in text or "gap" in case), text


def test_labels_that_contradict_or_lie_elsewhere(made: Any) -> None:
    both = {"dataset.json": edm(("x.png", 0)), "metadata.csv": b"file_name,label\nx.png,0\n"}
    assert refusal(made({"x.png": picture(), **both})) == "both dataset.json and metadata.csv say the classes"


def test_labels_below_the_images_folder(made: Any) -> None:
    files = {"a/x.png": picture(), "b/x.png": picture()}
    text = refusal(made({**files, "a/metadata.csv": b"file_name,label\nx.png,0\n"}))
    assert text == "a/metadata.csv is not understood: it lies below the images' folder"


def test_another_dataset_json_in_a_class_is_a_file_like_others(made: Any) -> None:
    found = load(made({"a/x.png": picture(), "b/x.png": picture(), "b/dataset.json": b"{}"}), WANTED)
    assert found.contents.classes == ("a", "b") and found.contents.left_out == {".json": 1}


def test_labels_that_never_end(tmp_path: Path) -> None:
    place = folder(tmp_path / "set", {"a/x.png": picture(), "b/x.png": picture()})
    os.mkfifo(place / "dataset.json")
    assert "dataset.json is not understood" in refusal(place)
    (place / "dataset.json").unlink()
    (place / "dataset.json").symlink_to("/dev/zero")
    assert "dataset.json is not understood" in refusal(place)
