"""A data set of encoded images, which are decoded when they are read."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError, printable
from ..dataset import BAD, Contents, Dataset, Files, Wanted, checksum
from .check import checked
from .pixels import decode, reason
from .quiet import quiet

NAMED = 3
"""How many of many bad images a line names."""


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
    wrapper: str = "",
    by_path: bool = False,
) -> Dataset:
    """A data set of encoded images, checked.

    files: read by several threads at once; an Unreadable that it raises says in words what is wrong with a file.
    labels: int64 [N]. where: the path in errors. stamp: is another one when a file has changed, so that the outcome of
    the check can be kept in the user's cache folder; "": it is not kept. wrapper: the folder that all names begin
    with, which is no part of the identity. by_path: whether names are paths of files. Raises DataError for an image
    that cannot be decoded, unless `wanted.skip_bad`, for a class without an image and for a number of channels other
    than 1 and 3.
    """
    if wanted.channels not in (1, 3):
        raise DataError(f"--data {where}: images have 1 or 3 channels, not {wanted.channels}: set model.in_channels")
    _refuse_empty(labels, classes, where)
    bad, transparent, animated, _ = checked(files, stamp, wanted)
    if bad and not wanted.skip_bad:
        first = min(bad)
        more = f"; and so on, {len(bad)} bad images of {len(labels)}" if len(bad) > 1 else ""
        raise DataError(f"--data {where}: {printable(files.names[first])} {bad[first]}{more}")
    if len(bad) == len(labels):
        raise DataError(f"--data {where}: holds no image that can be read")
    contents = Contents(kind, classes, Counter(left_out), list(notes))
    numbers = np.delete(np.arange(len(labels)), sorted(bad))
    labels = labels[torch.from_numpy(numbers)]
    _refuse_empty(labels, classes, where, " that can be read")
    if bad:
        named = [f"{printable(files.names[number])} {bad[number]}" for number in sorted(bad)]
        contents.left_out.update(BAD + text for text in named)
        contents.notes.append(
            f"{len(bad)} bad {'images are' if len(bad) > 1 else 'image is'} left out: "
            + "; ".join(named[:NAMED])
            + ("; ..." if len(bad) > NAMED else "")
        )
    if transparent:
        contents.notes.append(f"{transparent} transparent {'images' if transparent > 1 else 'image'}: laid over white")
    if animated:
        contents.notes.append(f"{animated} {'animations' if animated > 1 else 'animation'}: the first frame is taken")
    start = len(wrapper) + 1 if wrapper else 0
    contents.checksum = checksum((files.names[i][start:] for i in numbers), np.asarray(files.sizes)[numbers], labels)
    found = ImageSet(files, numbers, labels, contents, wanted, where)
    if by_path:
        found.names, found.wrapper = Some(files.names, numbers), wrapper
    return found


def _refuse_empty(labels: Tensor, classes: tuple[str, ...], where: str, what: str = "") -> None:
    empty = (torch.bincount(labels, minlength=len(classes)) == 0).nonzero()
    if classes and len(empty):
        name = printable(classes[int(empty[0])])
        more = f" ({len(empty)} of {len(classes)} classes are)" if len(empty) > 1 else ""
        raise DataError(f"--data {where}: {name} is a class without an image{what}{more}")


class Some(Sequence[str]):
    """Those of some names that have these numbers, int64 [N]."""

    def __init__(self, names: Sequence[str], numbers: np.ndarray) -> None:
        self._names, self._numbers = names, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, number: Any) -> Any:
        found = self._numbers[number]
        return [self._names[int(i)] for i in found] if isinstance(number, slice) else self._names[int(found)]


class ImageSet(Dataset):
    """numbers: int64 [N], the files of the samples."""

    numbers: np.ndarray

    def __init__(
        self, files: Files, numbers: np.ndarray, labels: Tensor, contents: Contents, wanted: Wanted, where: str
    ) -> None:
        self.labels, self.contents = labels, contents
        self.shape = wanted.channels, wanted.size, wanted.size
        self._files, self._where = files, where
        self.numbers, self.found = numbers, len(files.names)
        self._wanted = wanted._replace(say=Wanted._field_defaults["say"])

    @quiet
    def read(self, index: Tensor, mirrored: Tensor | None = None) -> Tensor:
        """uint8 [n, C, size, size]; see Dataset."""
        pixels = torch.empty((len(index), *self.shape), dtype=torch.uint8)
        into = pixels.numpy()
        for i, number in enumerate(self.numbers[index.numpy()].tolist()):
            try:
                into[i] = decode(self._files.read(number), self._wanted)
            except Exception as error:
                raise DataError(
                    f"--data {self._where}: {printable(self._files.names[number])} {reason(error)}"
                ) from None
        if mirrored is not None:
            pixels[mirrored] = pixels[mirrored].flip(3)
        return pixels
