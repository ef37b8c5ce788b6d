"""Images in a folder or zip, or wherever else there are encoded images: read and scaled when they are asked for."""

import itertools
import os
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path

from ...errors import DataError, printable
from ..dataset import Dataset, Unreadable, Wanted
from .folder import Folder
from .image_set import image_set
from .labels import classes_of
from .listing import BEGINNING, IMAGES, OTHERS, begins_like_an_image, ending, is_nobodys
from .zips import Zip

__all__ = ["Unreadable", "image_set", "load", "recognises"]

LOOKED_AT = 10_000
"""Names in a folder among which one must be an image, so that it is one of images."""


def recognises(place: Path) -> bool:
    """Whether it is a folder or zip with images in it, as far as some of its names tell."""
    try:
        if place.is_dir():
            return any(_looks_like_an_image(file) for file in itertools.islice(_some_files(place), LOOKED_AT))
        return (
            place.is_file()
            and zipfile.is_zipfile(place)
            and any(ending(name) in IMAGES and not any(map(is_nobodys, name.split("/"))) for name in _last_names(place))
        )
    except (OSError, ValueError):
        return False


def _some_files(place: Path) -> Iterator[Path]:
    """Files of a folder and of those in it, without following links to folders."""
    for folder, folders, files in os.walk(place):
        folders[:] = [name for name in folders if not is_nobodys(name)]
        yield from (Path(folder, name) for name in files if not is_nobodys(name))


def _looks_like_an_image(file: Path) -> bool:
    kind = ending(file.name)
    if kind in IMAGES or kind in OTHERS or not file.is_file():
        return kind in IMAGES
    with file.open("rb", buffering=0) as opened:
        return begins_like_an_image(opened.read(BEGINNING))


def _last_names(place: Path) -> Iterator[str]:
    """The names at the end of a zip's directory, which is the end of the zip."""
    with place.open("rb") as file:
        file.seek(max(0, place.stat().st_size - 2**20))
        entries = file.read(2**20).split(b"PK\1\2")[1:]
    for entry in entries:
        yield entry[42 : 42 + int.from_bytes(entry[24:26], "little")].decode("utf-8", "replace")


def _what_else(file: Path) -> str:
    """What is wrong with a file that is no zip; "" for a zip, a damaged one too."""
    with file.open("rb") as opened:
        beginning = opened.read(BEGINNING)
    if file.suffix.lower() == ".zip" or beginning.startswith(b"PK") or zipfile.is_zipfile(file):
        return ""
    if begins_like_an_image(beginning):
        return "is one image: name the folder that it lies in"
    return "is empty, or no kind of file that is read (docs/data.md lists them)"


def load(place: Path, wanted: Wanted) -> Dataset:
    """The images of a folder or zip, checked: each was decoded once. Raises DataError."""
    try:
        mode = place.stat().st_mode
        if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):  # the opening of a pipe waits for a writer
            raise DataError(f"--data {place}: cannot be read (neither a folder nor a file)")
        if stat.S_ISREG(mode) and (other := _what_else(place)):
            raise DataError(f"--data {place}: {other}")
        found = Folder(place) if stat.S_ISDIR(mode) else Zip(place)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"--data {place}: no such file or folder") from None
    except DataError:
        raise
    except Exception as error:  # of the disk, or of a zip's directory, of which zipfile raises many kinds
        text = printable(" ".join(str(error).split()))
        raise DataError(f"--data {place}: cannot be read ({text or type(error).__name__})") from None
    labels, classes, root = classes_of(found, str(place))
    about = {"kind": found.kind, "left_out": found.left_out, "notes": [], "where": str(place), "wrapper": root}
    return image_set(found, labels, classes, wanted, **about, stamp=found.stamp, by_path=True)
