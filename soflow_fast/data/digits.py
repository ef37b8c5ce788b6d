"""The 1797 handwritten digits that scikit-learn ships (Alpaydin and Kaynak 1998), 8 x 8 pixels of 0..16."""

import gzip
import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .dataset import Contents
from .memory import InMemory

LEVELS = 16


def load_digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 1, 8, 8] float32 in [-1, 1] (x / 8 - 1), labels [1797] int64."""
    table = _table()
    images = torch.from_numpy(table[:, :64]).float().reshape(-1, 1, 8, 8)
    return images / (LEVELS / 2) - 1, torch.from_numpy(table[:, 64]).long()


def digits() -> InMemory:
    """The digits as a data set."""
    images, labels = load_digits()
    return InMemory(images, labels, Contents("handwritten digits of scikit-learn", tuple("0123456789")))


def _table() -> np.ndarray:
    """The digits as scikit-learn has them, [1797, 64 pixels and the label]. Where it keeps them is read off the disk if
    it can be: importing scikit-learn takes a second, in which nothing else is looked at."""
    found = importlib.util.find_spec("sklearn")
    for folder in found.submodule_search_locations or () if found else ():
        file = Path(folder, "datasets", "data", "digits.csv.gz")
        if file.is_file():
            with gzip.open(file, "rt") as lines:
                return np.loadtxt(lines, delimiter=",")
    from sklearn.datasets import load_digits as load

    pixels, labels = load(return_X_y=True)
    return np.column_stack([pixels, labels])


def to_pixels(x: Tensor) -> Tensor:
    """Images in [-1, 1], [N, 1, 8, 8] -> pixels clipped to 0..16, [N, 64]."""
    return ((x.flatten(1) + 1) * (LEVELS / 2)).clamp(0, LEVELS)
