"""A data set of encoded images, which are decoded when they are read."""

from collections import Counter

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError, printable
from ..dataset import Contents, Dataset, Files, Wanted, checksum
from .check import checked
from .pixels import decode, quiet, reason

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
) -> Dataset:
    """A data set of encoded images, checked.

    files: read by several threads at once; an Unreadable that it raises says in words what is wrong with a file.
    labels: int64 [N]. where: the path in errors. stamp: is another one when a file has changed, so that the outcome of
    the check can be kept in the user's cache folder; "": it is not kept. Raises DataError for an image that cannot be
    decoded, unless `wanted.skip_bad`, and for a number of channels other than 1 and 3.
    """
    if wanted.channels not in (1, 3):
        raise DataError(f"--data {where}: images have 1 or 3 channels, not {wanted.channels}: set model.in_channels")
    bad, transparent, animated, _ = checked(files, stamp, wanted)
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
