"""The kinds of data sets that a path is recognised as, in the order in which they are asked."""

import importlib
from pathlib import Path
from typing import cast

from ..errors import DataError
from .dataset import Dataset, Format, Wanted

OF_LATENTS = ("latents", "latent_formats")
OF_IMAGES = ("cifar", "mnist", "huggingface", "webdataset", "images")
"""Modules of this package, each a `Format`. The last takes whatever is left."""
HINTS = {
    "images": "these are latents: take a preset on latents, such as imagenet256-b2",
    "latents": "these are images: encode them first (python -m soflow_fast.encode), or take a preset on images",
}


def image_formats() -> list[Format]:
    """Those of images, in that order."""
    return [_format(name) for name in OF_IMAGES]


def _format(name: str) -> Format:
    return cast(Format, importlib.import_module(f".{name}", __package__))


def open_dataset(path: str, kind: str, wanted: Wanted) -> Dataset:
    """The data set at a path. kind: "images" or "latents".

    Raises DataError if there is none, if it is of the other kind, or for what is wrong with it.
    """
    place = Path(path)
    try:
        found = place.exists()
    except OSError as error:
        raise DataError(f"--data {path}: cannot be read ({error.strerror})") from None
    if not found:
        raise DataError(f"--data {path}: no such file or folder")
    for name in (*OF_LATENTS, *OF_IMAGES):
        module = _format(name)
        if name == OF_IMAGES[-1] or module.recognises(place):
            if (name in OF_LATENTS) != (kind == "latents"):
                if kind == "latents" and not module.recognises(place):
                    raise DataError(f"--data {path}: holds no latents in a known format (docs/data.md lists them)")
                raise DataError(f"--data {path}: {HINTS[kind]}")
            return module.load(place, wanted)
    raise AssertionError("the last format takes all")
