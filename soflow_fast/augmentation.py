"""EDM's geometric augmentation for CIFAR-10 (arXiv 2206.00364, appendix F.2; after arXiv 2006.06676), and its labels.

An image is mirrored, and then, each with a probability of its own: upside down, scaled, turned, stretched along some
axis, moved. The change is made on an image of twice the size, by an orthogonal wavelet's low-pass filter on the way
there and back, of which the image beyond its borders is the mirrored one. What was done to an image is a function of
`Changes` alone, whatever stands beside it in a batch.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LABELS = 9
SPREAD = 0.2
"""Deviation of the binary logarithms of scale and stretch."""
SHIFT = 0.125
"""Deviation of a movement, in units of the side."""
SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
"""The low-pass filter of the symlet of six vanishing moments (Daubechies 1992)."""


class Changes(NamedTuple):
    """What is done to each image of a batch, [B] each; 0 of all: nothing."""

    mirror: Tensor
    """1: left and right are exchanged."""
    upside_down: Tensor
    """1: top and bottom are."""
    scale: Tensor
    """The image is scaled by 2^(0.2 scale)."""
    angle: Tensor
    """By which it is turned."""
    stretch: Tensor
    """It is scaled by 2^(0.2 stretch) along an axis, and by the inverse across it."""
    axis: Tensor
    """The angle of that."""
    right: Tensor
    """It is moved by so many eighths of its side."""
    down: Tensor

    @classmethod
    def drawn(cls, n: int, probability: float, source: torch.Generator) -> "Changes":
        """Changes of n images, on the device of a generator: mirrored with probability one half, the others with
        `probability` each, an axis other than that of the columns with one half."""
        device = source.device

        def chosen(values: Tensor, with_probability: float = probability) -> Tensor:
            kept = torch.rand(n, generator=source, device=device) < with_probability
            return values * kept

        def coin() -> Tensor:
            return torch.randint(2, (n,), generator=source, device=device).float()

        def normal() -> Tensor:
            return torch.randn(n, generator=source, device=device)

        def angle() -> Tensor:
            return (2 * torch.rand(n, generator=source, device=device) - 1) * math.pi

        both = chosen(torch.ones(n, device=device))
        return cls(
            mirror=coin(),
            upside_down=chosen(coin()),
            scale=chosen(normal()),
            angle=chosen(angle()),
            stretch=chosen(normal()),
            axis=chosen(angle(), 0.5),
            right=normal() * both,
            down=normal() * both,
        )

    @classmethod
    def of(cls, values: Tensor) -> "Changes":
        """The inverse of `stacked`."""
        return cls(*values.unbind(1))

    @property
    def stacked(self) -> Tensor:
        """[B, 8]."""
        return torch.stack(list(self), 1)

    @property
    def labels(self) -> Tensor:
        """What the network sees of them, [B, 9]; 0 of an image as it was."""
        turned = self.angle.cos() - 1, self.angle.sin()
        stretched = self.stretch * self.axis.cos(), self.stretch * self.axis.sin()
        values = self.mirror, self.upside_down, self.scale, *turned, *stretched, self.right, self.down
        return torch.stack(values, 1)

    def inverse(self, width: int, height: int) -> Tensor:
        """Where a pixel of a changed image is in the one before, [B, 3, 3], in pixels around the centre, [x, y, 1].

        Without mirroring, which is exact."""
        one, zero = torch.ones_like(self.scale), torch.zeros_like(self.scale)

        def matrix(*rows: Tensor) -> Tensor:
            return torch.stack([*rows, zero, zero, one], 1).view(-1, 3, 3)

        def turn(angle: Tensor) -> Tensor:
            return matrix(angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero)

        larger, longer = (SPREAD * self.scale).exp2(), (SPREAD * self.stretch).exp2()
        resized = matrix(1 / larger, zero, zero, zero, 1 / larger, zero)
        stretched = turn(-self.axis) @ matrix(1 / longer, zero, zero, zero, longer, zero) @ turn(self.axis)
        moved = matrix(one, zero, -self.right * width * SHIFT, zero, one, -self.down * height * SHIFT)
        return resized @ turn(self.angle) @ stretched @ moved


@torch.no_grad()
def augmented(x: Tensor, changes: Changes) -> Tensor:
    """Images [B, C, H, W], changed. Beyond a whole mirrored image on each side there is nothing, 0."""
    _, _, H, W = x.shape
    x = torch.where(_per_image(changes.mirror), x.flip(3), x)
    x = torch.where(_per_image(changes.upside_down), x.flip(2), x)
    # As much beyond the borders as any change may need: what one image needs must not depend on the others.
    large = _doubled(F.pad(x, (W - 1, W - 1, H - 1, H - 1), mode="reflect"))
    edge = len(SYM6) // 4  # for the filter on the way back, cut off after it
    width, height = 2 * (W + 2 * edge), 2 * (H + 2 * edge)
    # A pixel at p, around the centre, is at 2 p - 1/2 in the doubled image, as the filter's centre is its sixth tap.
    there = changes.inverse(W, H)
    there = torch.cat([there[:, :2, :2], 2 * there[:, :2, 2:] + (there[:, :2, :2] - _eye(there)).sum(2, True) / 2], 2)
    sizes_in = torch.tensor([large.shape[3], large.shape[2]], dtype=x.dtype, device=x.device).view(1, 2, 1)
    sizes_out = torch.tensor([width, height, 2], dtype=x.dtype, device=x.device).view(1, 1, 3)
    theta = there.to(x.dtype) * sizes_out / sizes_in
    grid = F.affine_grid(theta, [len(x), x.shape[1], height, width], align_corners=False)
    large = F.grid_sample(large, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return _halved(large)[:, :, edge:-edge, edge:-edge]


def _per_image(values: Tensor) -> Tensor:
    return (values == 1).view(-1, 1, 1, 1)


def _eye(like: Tensor) -> Tensor:
    return torch.eye(2, dtype=like.dtype, device=like.device)


def _filters(x: Tensor) -> list[tuple[Tensor, int]]:
    """The filter along each axis, for every channel, and that axis."""
    low = torch.tensor(SYM6, dtype=x.dtype, device=x.device)
    return [(low.view(shape).expand(x.shape[1], 1, *shape[2:]), axis) for shape, axis in _SHAPES]


_SHAPES = (((1, 1, 1, len(SYM6)), 1), ((1, 1, len(SYM6), 1), 0))
_BEFORE = len(SYM6) // 2 - 1
"""Taps before the filter's centre."""


def _along(axis: int) -> dict[str, Any]:
    """Steps of two and the padding of a filter, along an axis alone."""
    return {
        "stride": (2, 1) if axis == 0 else (1, 2),
        "padding": (_BEFORE, 0) if axis == 0 else (0, _BEFORE),
    }


def _doubled(x: Tensor) -> Tensor:
    for weight, axis in _filters(x):
        x = F.conv_transpose2d(x, weight, groups=x.shape[1], **_along(axis))
    return x


def _halved(x: Tensor) -> Tensor:
    """The inverse of `_doubled`, as the filter is orthogonal to itself moved by two."""
    for weight, axis in _filters(x):
        x = F.conv2d(x, weight, groups=x.shape[1], **_along(axis))
    return x
