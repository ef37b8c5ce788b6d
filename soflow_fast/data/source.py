"""The interface of every data set, and the order in which a run sees it."""

import functools
from pathlib import Path

import torch
from torch import Tensor

from ..config.schema import Config
from ..errors import DataError
from ..rng import generator
from .dataset import Wanted


class Source:
    """Images [N, C, H, W] (uint8 in 0..255, or float already in [-1, 1]) with labels [N], in memory.

    The run's order: each epoch is a fresh permutation of the whole set, and step k takes its positions
    k * batch_size and on; rank r of W takes the r-th slice of them, so the order does not depend on W.
    """

    def __init__(self, images: Tensor, labels: Tensor, *, seed: int, batch_size: int, flip: bool = False) -> None:
        self.images, self.labels = images, labels
        self.seed, self.batch_size, self.flip = seed, batch_size, flip
        self._order = functools.lru_cache(maxsize=2)(self._order_of)

    def __len__(self) -> int:
        return len(self.images)

    def _order_of(self, epoch: int) -> Tensor:
        return torch.randperm(len(self), generator=generator(self.seed, epoch, 0, "data order"))

    def indices(self, step: int, rank: int = 0, world: int = 1) -> Tensor:
        """Which images rank `rank` of `world` takes at `step`, [batch_size / world]."""
        start, stop = (step * self.batch_size + self.batch_size * r // world for r in (rank, rank + 1))
        position = torch.arange(start, stop)
        epoch = position // len(self)
        return torch.cat([self._order(int(e))[position[epoch == e] % len(self)] for e in epoch.unique()])

    def batch(self, step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
        """The images, float32 in [-1, 1], and labels of one step."""
        index = self.indices(step, rank, world)
        x = self.images[index]
        x = x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x
        if self.flip:
            source = generator(self.seed, step, 0, "flip")  # of the whole batch: which image is mirrored is no rank's
            start, stop = (self.batch_size * r // world for r in (rank, rank + 1))
            mirrored = torch.rand(self.batch_size, generator=source)[start:stop] < 0.5
            x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
        return x, self.labels[index]


def open_source(config: Config) -> Source:
    """The data set of a configuration. Raises DataError if it is missing or does not fit the model."""
    kind, path = config.data.kind, config.data.path
    if kind == "digits":
        if path:
            raise DataError(f"--data {path}: the digits come with scikit-learn and take no path")
        from .digits import load_digits

        images, labels = load_digits()
    elif kind == "images":
        if not path:
            raise DataError(f"--data is missing: preset {config.preset} needs a folder or zip of images, CLASS/NAME")
        from .images import load

        found = load(Path(path), Wanted(config.model.input_size, config.model.in_channels))
        images, labels = found.read(torch.arange(len(found))), found.labels
    else:
        raise DataError(
            f"data.kind {kind!r}: this version cannot read VAE latents yet; --dry-run shows what such a run needs"
        )
    model = config.model
    wanted, got = (model.in_channels, model.input_size, model.input_size), tuple(images.shape[1:])
    if got != wanted:
        raise DataError(f"the images are {got}, the model takes {wanted}: set model.in_channels and model.input_size")
    classes = int(labels.max()) + 1
    if model.num_classes and classes > model.num_classes:
        raise DataError(f"the data has {classes} classes, the model {model.num_classes}: set model.num_classes")
    return Source(images, labels, seed=config.seed, batch_size=config.batch_size, flip=config.data.flip)
