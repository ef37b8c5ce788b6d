"""Images in a folder or zip, or wherever else there are encoded images: read and scaled when they are asked for."""

import contextlib
import hashlib
import itertools
import json
import os
import stat
import threading
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import PIL
import torch
from torch import Tensor

from ..errors import DataError, printable
from ..files import cache_folder, write_file
from ..version import __version__
from .dataset import Contents, Dataset, Files, Wanted, checksum
from .image_files import BEGINNING, IMAGES, LARGEST_FILE, OTHERS, Folder, begins_like_an_image, ending, is_nobodys
from .image_labels import classes_of
from .image_zip import Zip
from .pixels import decode, examine, quiet, reason

LOOKED_AT = 10_000
"""Names in a folder among which one must be an image, so that it is one of images."""
SECONDS = 5
"""Between two lines about a check that takes long."""
TOGETHER = 32
"""Images that a thread takes at once to check them."""
REMEMBERED = 256
"""Checks of fewer images are not kept: they are soon made again."""
NAMED = 3
"""How many of many bad images a line names."""


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


def load(place: Path, wanted: Wanted) -> Dataset:
    """The images of a folder or zip, checked: each was decoded once. Raises DataError."""
    try:
        mode = place.stat().st_mode
        if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):  # the opening of a pipe waits for a writer
            raise DataError(f"--data {place}: cannot be read (neither a folder nor a file)")
        found = Folder(place) if stat.S_ISDIR(mode) else Zip(place)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"--data {place}: no such file or folder") from None
    except DataError:
        raise
    except Exception as error:  # of the disk, or of a zip's directory, of which zipfile raises many kinds
        text = printable(" ".join(str(error).split()))
        raise DataError(f"--data {place}: cannot be read ({text or type(error).__name__})") from None
    labels, classes = classes_of(found, str(place))
    about = {"kind": found.kind, "left_out": found.left_out, "notes": [], "where": str(place)}
    return image_set(found, labels, classes, wanted, **about, stamp=found.stamp)


def image_set(
    files: Files,
    labels: Tensor,
    classes: tuple[str, ...],
    wanted: Wanted,
    *,
    kind: str,
    left_out: Counter[str],
    notes: list[str],
    where: str,
    stamp: str = "",
) -> Dataset:
    """A data set of encoded images, checked.

    files: read by several threads at once; an Unreadable that it raises says in words what is wrong with a file.
    labels: int64 [N]. where: the path in errors. stamp: is another one when a file has changed, so that the outcome of
    the check can be kept in the user's cache folder; "": it is not kept. Raises DataError for an image that cannot be
    decoded, unless `wanted.skip_bad`, and for a number of channels other than 1 and 3.
    """
    if wanted.channels not in (1, 3):
        raise DataError(f"--data {where}: images have 1 or 3 channels, not {wanted.channels}: set model.in_channels")
    bad, transparent, animated = _checked(files, stamp, wanted)
    if bad and not wanted.skip_bad:
        first = min(bad)
        more = f"; and so on, {len(bad)} bad images of {len(labels)}" if len(bad) > 1 else ""
        raise DataError(f"--data {where}: {printable(files.names[first])} {bad[first]}{more}")
    if len(bad) == len(labels):
        raise DataError(f"--data {where}: holds no image that can be read")
    contents = Contents(kind, classes, Counter(left_out), list(notes))
    numbers = np.delete(np.arange(len(labels)), sorted(bad))
    if bad:
        named = [f"{printable(files.names[number])} {bad[number]}" for number in sorted(bad)]
        contents.left_out.update(f"bad: {text}" for text in named)
        contents.notes.append(
            f"{len(bad)} bad {'images are' if len(bad) > 1 else 'image is'} left out: "
            + "; ".join(named[:NAMED])
            + ("; ..." if len(bad) > NAMED else "")
        )
    if transparent:
        contents.notes.append(f"{transparent} transparent {'images' if transparent > 1 else 'image'}: laid over white")
    if animated:
        contents.notes.append(f"{animated} {'animations' if animated > 1 else 'animation'}: the first frame is taken")
    labels = labels[torch.from_numpy(numbers)]
    contents.checksum = checksum((files.names[i] for i in numbers), np.asarray(files.sizes)[numbers], labels)
    return ImageSet(files, numbers, labels, contents, wanted, where)


class ImageSet(Dataset):
    """numbers: int64 [N], the files of the samples."""

    def __init__(
        self, files: Files, numbers: np.ndarray, labels: Tensor, contents: Contents, wanted: Wanted, where: str
    ) -> None:
        self.labels, self.contents = labels, contents
        self.shape = wanted.channels, wanted.size, wanted.size
        self._files, self._numbers, self._where = files, numbers, where
        self._wanted = wanted._replace(say=Wanted._field_defaults["say"])

    @quiet
    def read(self, index: Tensor, mirrored: Tensor | None = None) -> Tensor:
        """uint8 [n, C, size, size]; see Dataset."""
        pixels = torch.empty((len(index), *self.shape), dtype=torch.uint8)
        into = pixels.numpy()
        for i, number in enumerate(self._numbers[index.numpy()].tolist()):
            try:
                into[i] = decode(self._files.read(number), self._wanted)
            except Exception as error:
                raise DataError(
                    f"--data {self._where}: {printable(self._files.names[number])} {reason(error)}"
                ) from None
        if mirrored is not None:
            pixels[mirrored] = pixels[mirrored].flip(3)
        return pixels


Outcome = tuple[dict[int, str], int, int]
"""What is wrong with the images that are bad, by their numbers; how many are transparent, and how many animations."""


def _checked(files: Files, stamp: str, wanted: Wanted) -> Outcome:
    """The outcome of the check, from the cache folder if it was made before."""
    count = len(files.names)
    if not stamp or count < REMEMBERED:
        return _check(files, wanted)
    digest = hashlib.sha256(repr((__version__, PIL.__version__, stamp)).encode())
    digest.update(checksum(files.names, np.asarray(files.sizes), torch.empty(0, dtype=torch.int64)).encode())
    path = cache_folder() / "images" / f"{digest.hexdigest()}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        kept = json.loads(path.read_bytes())
        bad = {int(number): str(text) for number, text in kept["bad"].items()}
        if all(0 <= number < count for number in bad):
            return bad, int(kept["transparent"]), int(kept["animated"])
    bad, transparent, animated = _check(files, wanted)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        values = {"bad": bad, "transparent": transparent, "animated": animated}
        write_file(path, json.dumps(values).encode(), synced=False)
    return bad, transparent, animated


@quiet
def _check(files: Files, wanted: Wanted) -> Outcome:
    """Decode every image once, with a thread for each processor."""
    count = len(files.names)
    starts = iter(range(0, count, TOGETHER))
    lock, stopped = threading.Lock(), threading.Event()
    bad: dict[int, str] = {}
    seen = Counter[str]()

    def work() -> None:
        while not stopped.is_set():
            with lock:
                start = next(starts, None)
            if start is None:
                return
            numbers = range(start, min(start + TOGETHER, count))
            outcomes = [_examined(files, number) for number in numbers]
            with lock:
                seen["checked"] += len(numbers)
                for number, outcome in zip(numbers, outcomes, strict=True):
                    if isinstance(outcome, str):
                        bad[number] = outcome
                    else:
                        seen.update(outcome)

    threads = min(_processors(), -(-count // TOGETHER))
    with ThreadPoolExecutor(threads, "check") as pool:
        working = [pool.submit(work) for _ in range(threads)]
        try:
            while wait(working, SECONDS).not_done:
                wanted.say(f"checking images: {seen['checked']} of {count}, {len(bad)} bad")
        finally:
            stopped.set()
    for done in working:
        done.result()
    return bad, seen["transparent"], seen["animated"]


def _examined(files: Files, number: int) -> Iterable[str] | str:
    """What is to be said of an image; in a text, what is wrong with it."""
    size = int(files.sizes[number])
    if size > LARGEST_FILE:
        return f"unpacks to {size >> 20} MiB ({size} bytes), and at most {LARGEST_FILE >> 20} MiB are read"
    try:
        transparent, animated = examine(files.read(number))
    except Exception as error:
        return reason(error)
    return [word for word, said in (("transparent", transparent), ("animated", animated)) if said]


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
