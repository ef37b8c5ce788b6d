"""Images from a folder or a zip, one folder a class: CLASS/NAME.jpg. All of them are held in memory as uint8."""

import contextlib
import io
import os
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .dataset import Wanted
from .memory import InMemory

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
"""The formats that are read, whatever a file is called: for some others Pillow starts a program (EPS)."""
LARGEST_FILE = 64 * 2**20


def load_images(path: str, size: int) -> tuple[Tensor, Tensor]:
    """Images [N, 3, size, size] uint8 and labels [N] int64, classes numbered in the order of their folders' names.

    Links to folders are followed, as torchvision's ImageFolder does, but not back into a folder that they are in. Gray
    of 16 bits is rounded to 8. Raises DataError naming the file that is missing, unreadable or of another size.
    """
    from PIL import Image

    place = Path(path)
    if not place.exists():
        raise DataError(f"--data {path}: no such file or folder")
    try:
        entries = sorted(_zip_entries(place) if place.is_file() else _folder_entries(place))
        classes = {name: i for i, name in enumerate(sorted({folder for folder, _ in entries}))}
        if not entries:
            raise DataError(f"--data {path}: holds no images ({', '.join(sorted(SUFFIXES))})")
        images = np.empty((len(entries), size, size, 3), np.uint8)
        with zipfile.ZipFile(place) if place.is_file() else contextlib.nullcontext() as archive:
            for i, (_, name) in enumerate(entries):
                try:
                    content = _member(archive, name) if archive else (place / name).read_bytes()
                    with warnings.catch_warnings():
                        # An image of another size is refused below, before any of it is unpacked.
                        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                        image = Image.open(io.BytesIO(content), formats=FORMATS)
                    with image:
                        got = image.size
                        images[i] = _rgb(image) if got == (size, size) else 0
                except Exception as error:  # zip and image decoders raise many kinds; all mean that the file is damaged
                    raise DataError(f"--data {path}: {name} is no readable image ({type(error).__name__})") from None
                if got != (size, size):
                    raise DataError(f"--data {path}: {name} is {got[0]} x {got[1]}, not {size} x {size}")
    except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        raise DataError(f"--data {path}: cannot be read ({error})") from None
    labels = torch.tensor([classes[folder] for folder, _ in entries])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    """The content of a zip's member, unpacked no further than to the length that it states."""
    with archive.open(name) as file:
        return file.read(archive.getinfo(name).file_size + 1)


def _check_length(place: Path, name: object, length: int) -> None:
    if length > LARGEST_FILE:
        raise DataError(f"--data {place}: {name} unpacks to {length >> 20} MiB, more than an image has")


def _rgb(image: "Image") -> np.ndarray:
    """uint8 [H, W, 3] or, of gray, [H, W, 1]. Of 16-bit colours Pillow itself drops the lower 8 bits."""
    if image.mode.startswith("I"):  # 16 bits of gray, which Pillow's own conversion would clip at 255
        return np.rint(np.asarray(image, np.float64) / 257)[..., None]
    return np.asarray(image.convert("RGB"))


def _folder_entries(place: Path) -> Iterator[tuple[str, str]]:
    waiting: list[tuple[Path, frozenset[tuple[int, int]]]] = [(place, frozenset())]
    while waiting:
        folder, within = waiting.pop()
        known = folder.stat()
        if (known.st_dev, known.st_ino) in within:  # a link back up
            continue
        within = within | {(known.st_dev, known.st_ino)}
        with os.scandir(folder) as found:
            for entry in found:
                file = folder / entry.name
                if file.is_dir() if entry.is_symlink() else entry.is_dir():  # the former bears a link to itself
                    waiting.append((file, within))
                elif file.suffix.lower() in SUFFIXES:
                    relative = file.relative_to(place)
                    if not file.is_file():
                        raise DataError(f"--data {place}: {relative} is no file, or a link to none")
                    _check_length(place, relative, entry.stat().st_size)
                    yield relative.parent.as_posix(), relative.as_posix()


def _zip_entries(place: Path) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    with zipfile.ZipFile(place) as archive:
        for info in archive.infolist():
            name = PurePosixPath(info.filename)
            hidden = name.name.startswith("._") or "__MACOSX" in name.parts  # what macOS adds to a zip
            if name.suffix.lower() not in SUFFIXES or info.is_dir() or hidden:
                continue
            if name.is_absolute() or ".." in name.parts or "\\" in info.filename:
                raise DataError(f"--data {place}: {info.filename!r} points out of the zip")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # the others know no bound
                raise DataError(f"--data {place}: {info.filename} is compressed by another method than deflate")
            if info.filename in seen:  # by its name only the last one could be read
                raise DataError(f"--data {place}: {info.filename} is in it twice")
            seen.add(info.filename)
            _check_length(place, info.filename, info.file_size)
            yield name.parent.as_posix(), info.filename


LATENTS = False


def recognises(place: Path) -> bool:
    """Whether there is a folder or zip."""
    return True


def load(place: Path, wanted: Wanted) -> InMemory:
    """All images in memory."""
    images, labels = load_images(str(place), wanted.size)
    return InMemory(images, labels)
