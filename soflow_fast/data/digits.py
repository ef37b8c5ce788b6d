"""The 1797 handwritten digits that scikit-learn ships (Alpaydin and Kaynak 1998), 8 x 8 pixels of 0..16."""

import torch
from torch import Tensor

LEVELS = 16


def load_digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 1, 8, 8] float32 in [-1, 1] (x / 8 - 1), labels [1797] int64."""
    from sklearn.datasets import load_digits as load

    pixels, labels = load(return_X_y=True)
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8)
    return images / (LEVELS / 2) - 1, torch.from_numpy(labels).long()


def to_pixels(x: Tensor) -> Tensor:
    """Images in [-1, 1], [N, 1, 8, 8] -> pixels clipped to 0..16, [N, 64]."""
    return ((x.flatten(1) + 1) * (LEVELS / 2)).clamp(0, LEVELS)
