"""Data sets that are arrays of pixels: fitted to the model's size and channels once, and held in memory as uint8."""

import hashlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import DataError, printable
from .dataset import Contents, Wanted, checksum
from .memory import InMemory

if TYPE_CHECKING:
    from PIL.Image import Image

BLOCK = 1024
"""Images that are hashed at a time."""


def array_set(
    images: np.ndarray,
    labels: np.ndarray,
    classes: tuple[str, ...],
    wanted: Wanted,
    *,
    kind: str,
    notes: list[str],
    where: str,
) -> InMemory:
    """The data set of images, uint8 [N, H, W, C], and labels [N].

    where: what an error begins with, `--data PATH`. Raises DataError for counts that disagree, for labels without a
    class and for channels that the images cannot be turned into.
    """
    if not len(images):
        raise DataError(f"{where}: holds no images")
    if len(images) != len(labels):
        raise DataError(f"{where}: holds {len(images)} images and {len(labels)} labels")
    outside = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if len(outside):
        first = int(outside[0])
        raise DataError(f"{where}: label {int(labels[first])} of image {first} is not in 0..{len(classes) - 1}")
    height, width = images.shape[1:3]
    if (height, width) != (wanted.size, wanted.size):
        notes = [*notes, f"images of {height} x {width} are scaled to {wanted.size} x {wanted.size}"]
    label = torch.from_numpy(labels.astype(np.int64))
    sums = checksum([f"pixels {_sha256(images)}"], np.array([images.nbytes]), label)
    fitted = torch.from_numpy(fit(images, wanted, where))
    return InMemory(fitted, label, Contents(kind, classes, notes=notes, checksum=sums))


def fit(images: np.ndarray, wanted: Wanted, where: str) -> np.ndarray:
    """Images uint8 [N, H, W, C], C 1 or 3, as uint8 [N, wanted.channels, wanted.size, wanted.size].

    Sizes as in Dhariwal and Nichol 2021 (arXiv 2105.05233; `center_crop_arr` of their code): halved by a box filter
    while the short side is at least twice the size, scaled by a bicubic one until it is the size, and cropped at the
    centre; with `wanted.resize` the two sides are scaled apart and nothing is cropped. Colours become gray by luminance
    (ITU-R 601-2), gray becomes colours by repetition. Raises DataError for other channels.
    """
    channels = images.shape[3]
    if channels not in (1, 3) or wanted.channels not in (1, 3):
        raise DataError(
            f"{where}: the images have {channels} channels, the model takes {wanted.channels}: set model.in_channels "
            "to 1 or 3"
        )
    if images.shape[1:3] != (wanted.size, wanted.size) or (channels, wanted.channels) == (3, 1):
        fitted = np.empty((len(images), min(channels, wanted.channels), wanted.size, wanted.size), np.uint8)
        for i, image in enumerate(_pillow(images, wanted.channels)):
            pixels = np.asarray(_sized(image, wanted))
            fitted[i] = pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels
    else:
        fitted = images.transpose(0, 3, 1, 2)
    fitted = np.ascontiguousarray(fitted if fitted.shape[1] == wanted.channels else fitted.repeat(wanted.channels, 1))
    return fitted if fitted.flags.writeable else fitted.copy()  # torch takes no view of bytes


def looked_through(place: Path, names: Collection[str]) -> Path:
    """The innermost of folders that each hold one folder only, of one of these names; what else is in them is files."""
    while place.is_dir():
        folders = [Path(entry) for entry in os.scandir(place) if entry.is_dir() and entry.name[0] != "."]
        if len(folders) != 1 or folders[0].name not in names:
            break
        place = folders[0]
    return place


def reason(error: BaseException) -> str:
    """What an error says, in one printable line and without a path."""
    return printable(getattr(error, "strerror", None) or str(error)) or type(error).__name__


def _pillow(images: np.ndarray, channels: int) -> Iterator["Image"]:
    from PIL import Image

    for pixels in images:
        image = Image.fromarray(np.ascontiguousarray(pixels if pixels.shape[2] == 3 else pixels[..., 0]))
        yield image.convert("L") if channels == 1 else image


def _sized(image: "Image", wanted: Wanted) -> "Image":
    from PIL.Image import Resampling

    size = wanted.size
    if wanted.resize:
        return image.resize((size, size), Resampling.BICUBIC)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _sha256(images: np.ndarray) -> str:
    digest = hashlib.sha256(repr(images.shape).encode())
    for start in range(0, len(images), BLOCK):
        digest.update(np.ascontiguousarray(images[start : start + BLOCK]).data)
    return digest.hexdigest()
