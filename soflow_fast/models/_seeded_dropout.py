"""Dropout as a function of a seed for each sample, so that two forwards that must leave out the same do so."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Odd constants of well-known mixers of 32-bit integers: murmur3's, and 2^32 divided by the golden ratio.
_MIX1, _MIX2, _GOLDEN = -2048144789, -1028477387, -1640531527


class SeededDropout(nn.Module):
    """Numbers [B, ...] of which each is 0 with probability p, and 1 / (1 - p) times itself else.

    What is left out of a sample depends on its seed, on `number` (that of the layer in its network) and on the place
    alone: neither on the rest of the batch, nor on the device, nor on the mode of the module. Without seeds nothing is.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.number = 0
        self._seeds: Tensor | None = None

    @contextmanager
    def seeded(self, seeds: Tensor | None) -> Iterator[None]:
        """Within the context, with these seeds, int32 [B], or none."""
        self._seeds = seeds
        try:
            yield
        finally:
            self._seeds = None

    def forward(self, x: Tensor) -> Tensor:
        if self._seeds is None or self.p == 0:
            return x
        return x * (self.kept(self._seeds, x.shape[1:]).to(x.dtype) * (1 / (1 - self.p)))

    def kept(self, seeds: Tensor, shape: torch.Size) -> Tensor:
        """Which numbers of samples of this shape stay, bool [B, ...]."""
        place = torch.arange(shape.numel(), dtype=torch.int32, device=seeds.device)
        own = _mixed(place * _GOLDEN + _wrapped(self.number * 0x5BD1E995 + 1))
        bits = _mixed(own ^ _mixed(seeds)[:, None])
        return (bits >= int(self.p * 2**32) - 2**31).view(len(seeds), *shape)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def _wrapped(value: int) -> int:
    """A whole number modulo 2^32 as an int32 has it."""
    return (value + 2**31) % 2**32 - 2**31


def _mixed(x: Tensor) -> Tensor:
    """murmur3's last steps on int32: each bit of x changes each bit of the result with probability one half."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * _MIX1
    x = (x ^ ((x >> 13) & 0x7FFFF)) * _MIX2
    return x ^ ((x >> 16) & 0xFFFF)
