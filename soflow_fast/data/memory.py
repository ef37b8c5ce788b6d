"""A data set that is held in memory."""

import hashlib

import torch
from torch import Tensor

from .dataset import Contents, Dataset


class InMemory(Dataset):
    """Images [N, C, H, W], uint8 in 0..255 or float already in [-1, 1], with labels int64 [N]."""

    copies = True

    def __init__(self, images: Tensor, labels: Tensor, contents: Contents | None = None) -> None:
        self.images, self.labels = images, labels
        self.shape = (images.shape[1], images.shape[2], images.shape[3])
        if contents is None:
            classes = int(labels.max()) + 1 if len(labels) else 0
            contents = Contents("tensors", tuple(map(str, range(classes))))
        if not contents.checksum:
            contents.checksum = _checksum(images, labels)
        self.contents = contents

    def read(self, index: Tensor, mirrored: Tensor | None = None) -> Tensor:
        images = self.images[index]
        return images if mirrored is None else torch.where(mirrored[:, None, None, None], images.flip(3), images)


def _checksum(images: Tensor, labels: Tensor) -> str:
    digest = hashlib.sha256()
    for values in (images, labels):
        digest.update(f"{values.dtype} {list(values.shape)}\n".encode())
        digest.update(values.contiguous().numpy().tobytes())
    return digest.hexdigest()
