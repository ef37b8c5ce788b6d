"""A data set whose samples are their own number."""

import torch

from soflow_fast.data import Contents, Dataset
from soflow_fast.errors import DataError


class Numbers(Dataset):
    """Samples that are their own number, read with the number of the process; sample 13 cannot be read."""

    def __init__(self, n: int, bad: int = -1) -> None:
        self.contents, self.labels = Contents("numbers", ("a", "b")), torch.arange(n) % 2
        self.shape, self.bad = (1, 1, 2), bad

    def read(self, index: torch.Tensor, mirrored: torch.Tensor | None = None) -> torch.Tensor:
        if self.bad in index.tolist():
            raise DataError(f"--data x: {self.bad} is damaged")
        values = torch.stack([index, torch.full_like(index, -1)], 1).float()[:, None, None]
        return values if mirrored is None else torch.where(mirrored[:, None, None, None], values.flip(3), values)
