"""Folders and zips of small images, for the tests of what is made of them."""

import io
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from soflow_fast.data.dataset import Dataset, Wanted
from soflow_fast.data.images import load
from soflow_fast.errors import DataError

WANTED = Wanted(4, 3)
Files = dict[str, bytes]


def picture(
    value: int = 0, kind: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (4, 4), **options: Any
) -> bytes:
    """An image file of one gray."""
    buffer = io.BytesIO()
    colour = (
        value
        if mode in ("L", "P", "1")
        else (value,) * (len(mode) if mode != "RGBA" else 3) + (128,) * (mode == "RGBA")
    )
    Image.new(mode, size, colour).save(buffer, kind, **options)
    return buffer.getvalue()


def folder(place: Path, files: Files) -> Path:
    for name, content in files.items():
        if name.endswith("/"):
            (place / name).mkdir(parents=True, exist_ok=True)
            continue
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    return place


def archive(place: Path, files: Files) -> Path:
    place = place.with_suffix(".zip")
    with zipfile.ZipFile(place, "w") as file:
        for i, (name, content) in enumerate(files.items()):
            file.writestr(zipfile.ZipInfo(name), content, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[i % 2])
    return place


def values(found: Dataset) -> list[int]:
    return found.read(torch.arange(len(found)))[:, 0, 0, 0].tolist()


def refusal(place: Path, wanted: Wanted = WANTED) -> str:
    """What is said of a place that is refused, after its path."""
    with pytest.raises(DataError) as error:
        load(place, wanted)
    text = str(error.value)
    assert text.startswith(f"--data {place}: ") and "\n" not in text
    return text.removeprefix(f"--data {place}: ")
