"""Discrete values as points of a space: 16 levels as one number, as four bits, or as a one-hot vector.

A code gives level k the point code[k], at a corner of a cube for bits and one-hot vectors: -scale or scale in each
channel (bits: Chen, Zhang and Hinton, arXiv 2208.04202). Whatever a model gives is read back as the nearest point.
One value alone is then a mixture of point masses, whose flow is that of Gaussians of vanishing deviation (`Mixture`).
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from benchmarks.exact.mixture import Mixture
from soflow_fast.data.digits import LEVELS, load_digits, to_pixels

Kind = Literal["grey", "bits", "one-hot"]
KINDS: tuple[Kind, ...] = get_args(Kind)
COUNT = 16
DEVIATION = 0.01
"""Of each Gaussian in the place of a point mass, in units of the distance between neighbouring values of a channel."""


class Code(NamedTuple):
    """Levels as points."""

    kind: Kind
    scale: float
    """Half the distance between the two values of a channel; of grey, half that of the outermost levels."""

    @property
    def points(self) -> Tensor:
        """The point of each level, float32 [16, channels]."""
        k = torch.arange(COUNT)
        if self.kind == "grey":
            unit = k[:, None] / (COUNT - 1)
        elif self.kind == "bits":
            unit = k[:, None] >> torch.arange(3, -1, -1) & 1
        else:
            unit = torch.eye(COUNT)
        return self.scale * (2 * unit.float() - 1)

    @property
    def channels(self) -> int:
        """Numbers in a point."""
        return self.points.shape[1]

    @property
    def spacing(self) -> float:
        """The distance between neighbouring values of a channel."""
        return 2 * self.scale / (COUNT - 1 if self.kind == "grey" else 1)

    def encode(self, levels: Tensor) -> Tensor:
        """Levels, int64 [B, H, W] -> [B, channels, H, W] float32."""
        return self.points[levels].movedim(-1, 1)

    def decode(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] -> the level of the nearest point, int64 [B, H, W]."""
        if self.kind == "one-hot":
            return x.argmax(1)
        if self.kind == "bits":
            return ((x > 0).long() * (1 << torch.arange(3, -1, -1)).view(4, 1, 1)).sum(1)
        return ((x[:, 0] / self.scale + 1) / 2 * (COUNT - 1)).round().clamp(0, COUNT - 1).long()

    def near(self, x: Tensor, within: float = 0.1) -> Tensor:
        """Which of [B, channels, H, W] are no further than this part of the spacing from a point in any channel, bool
        [B, H, W]."""
        return ((x - self.encode(self.decode(x))).abs() <= within * self.spacing).all(1)

    def mixture(self, frequencies: Tensor) -> Mixture:
        """One value alone, of levels that have these frequencies, [16] float64, all above 0."""
        points = self.points.double()
        return Mixture(frequencies / frequencies.sum(), points, torch.full_like(points, DEVIATION * self.spacing))


def digit_levels() -> tuple[Tensor, Tensor]:
    """The digits at 16 levels, int64 [1797, 8, 8], and their labels [1797]: of 0..16 the two brightest are one."""
    images, labels = load_digits()
    return to_pixels(images).round().long().clamp(max=COUNT - 1).reshape(-1, 8, 8), labels


def to_digits() -> Callable[[Tensor], Tensor]:
    """What makes images [B, 1, 8, 8] in [-1, 1] of levels [B, 8, 8]: each its pixel, the brightest one the mean of the
    two that it stands for."""
    pixels = to_pixels(load_digits()[0])
    value = torch.arange(COUNT, dtype=torch.float32)
    value[-1] = pixels[pixels >= COUNT - 1].mean()
    return lambda levels: (value[levels] / (LEVELS / 2) - 1)[:, None]
