"""What every network that features are taken of is, and one of fixed random convolutions, which needs no weights."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ...rng import generator


class Extracted(NamedTuple):
    """What is known of n images, float32."""

    features: Tensor
    """[n, D], for distances, precision and recall."""
    spatial: Tensor | None = None
    """[n, S], features that know where things are, for sFID."""
    logits: Tensor | None = None
    """[n, K], for the Inception Score."""


Extract = Callable[[Tensor], Extracted]
"""Takes images, uint8 [n, 3, H, W] on the device that it is for."""


class Extractor(Protocol):
    """A network that features are taken of."""

    name: str
    """As it stands in the names of figures: "fd-NAME"."""

    def on(self, device: torch.device) -> Extract:
        """The same on a device. An image's features do not depend on the others of its batch, up to rounding."""
        ...


class RandomFeatures:
    """Three layers of random convolutions, the same ones everywhere, with the mean of each channel as features.

    Frechet distances of such features follow the large differences between two sets, colours, edges and textures, and
    need nothing to be downloaded. They compare runs on the same data with each other, and are no FID.
    """

    name = "random"
    WIDTHS = (32, 64, 128)

    def __init__(self) -> None:
        channels, self._weights = 3, []
        for layer, width in enumerate(self.WIDTHS):
            source = generator(0, layer, 0, "random features")
            scale = (2 / (9 * channels)) ** 0.5  # after He et al. 2015: values neither grow nor vanish
            self._weights.append(torch.randn(width, channels, 3, 3, generator=source) * scale)
            channels = width

    def on(self, device: torch.device) -> Extract:
        """See Extractor."""
        weights = [weight.to(device) for weight in self._weights]

        def extract(images: Tensor) -> Extracted:
            x, means = images.float() / 127.5 - 1, []
            for weight in weights:
                x = F.conv2d(x, weight, padding=1).relu()
                means.append(x.mean((2, 3)))
                if min(x.shape[2:]) > 1:
                    x = F.avg_pool2d(x, 2)
            return Extracted(torch.cat(means, 1))

        return extract
