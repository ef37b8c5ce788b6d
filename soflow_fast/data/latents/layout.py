"""What every set of latents has, whichever its format: shape, scale, and how a sample is drawn of a distribution.

    x = (mean + std eps - shift) scale,    eps ~ N(0, 1)

as diffusers applies `shift_factor` and `scaling_factor` of a VAE, and LightningDiT mean and std of a channel
(shift = mean, scale = 1 / std).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...errors import DataError, UserError
from ..dataset import Contents, Dataset, LatentSpace, Noise, Wanted

SD_SCALE = 0.18215
"""The scale of the 4 channels of Stable Diffusion's VAE (Rombach et al. 2022), by which no file says so."""
MOST_CLASSES = 2**20

Factor = float | tuple[float, ...]
"""One for all channels, or one for each."""


@dataclass(frozen=True)
class Layout:
    """The form of latents, and how they become what a model takes."""

    channels: int
    """Of a sample; a row that is stored has as many again where there is a std."""
    height: int
    width: int
    std: bool
    """Whether a row is mean || std [2C, H, W], and not a sample or a mean [C, H, W]."""
    scale: Factor = 1.0
    shift: Factor = 0.0
    vae: str = ""
    """Name or path of the VAE, "" if nothing says it."""

    def row(self) -> tuple[int, int, int]:
        """The shape of what is stored of a sample."""
        return (self.channels * (2 if self.std else 1), self.height, self.width)

    def problem(self) -> str:
        """What is wrong with the numbers, "" if nothing is."""
        sizes = (self.channels, self.height, self.width)
        if not all(0 < value < 2**16 for value in sizes):
            return f"latents of {in_words(sizes)} make no sense"
        for name, factor in (("scale", self.scale), ("shift", self.shift)):
            values = factor if isinstance(factor, tuple) else (factor,)
            if isinstance(factor, tuple) and len(values) != self.channels:
                return f"{name} has {len(values)} numbers, the latents {self.channels} channels"
            if not all(math.isfinite(value) for value in values) or (name == "scale" and 0 in values):
                return f"{name} {values[0]:g} makes no sense"
        return ""


class Latents(Dataset):
    """A data set whose rows are latents. `read` gives float16 [n, 2C, H, W] (mean || std), or [n, C, H, W] without."""

    def __init__(self, place: Path, layout: Layout, labels: Tensor, contents: Contents, *, mirrors: bool) -> None:
        self.place, self.layout, self.labels, self.contents = place, layout, labels, contents
        self.shape = (layout.channels, layout.height, layout.width)
        self.mirrors = mirrors
        contents.space = LatentSpace(layout.vae, layout.scale, layout.shift)
        self._factors: dict[torch.device, tuple[Tensor | float, Tensor | float]] = {}

    def decoded(self, raw: Tensor, noise: Noise) -> Tensor:
        """(mean + std eps - shift) scale, float32 [n, C, H, W], on the device of `raw`; noise: eps for [n, C, H, W]."""
        x = raw.float()
        if self.layout.std:
            mean, std = x.chunk(2, 1)
            x = torch.addcmul(mean, std, noise(tuple(mean.shape)).to(mean))
        if raw.device not in self._factors:
            self._factors[raw.device] = (_on(raw.device, self.layout.scale), _on(raw.device, self.layout.shift))
        scale, shift = self._factors[raw.device]
        return (x - shift) * scale

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_factors": {}}


def _on(device: torch.device, factor: Factor) -> Tensor | float:
    return torch.tensor(factor, device=device).view(-1, 1, 1) if isinstance(factor, tuple) else factor


def check_wanted(place: Path, layout: Layout, wanted: Wanted) -> None:
    """Raise DataError, with both, if latents are of another shape or VAE than wanted; a size of 0 takes any."""
    got, asked = (layout.channels, layout.height, layout.width), (wanted.channels, wanted.size, wanted.size)
    if any(a not in (0, g) for g, a in zip(got, asked, strict=True)):
        hint = f"the model takes {in_words(asked)}: set model.in_channels and model.input_size"
        hint = hint if wanted.size else f"--channels says {wanted.channels}"  # of a conversion, where there is no model
        raise DataError(f"--data {place}: the latents are {in_words(got)}, {hint}")
    if wanted.vae and layout.vae and wanted.vae != layout.vae:
        raise DataError(f"--data {place}: the latents are of the VAE {layout.vae}, not of {wanted.vae}")


def check_labels(place: Path, name: Callable[[int], str], labels: Tensor, classes: int = MOST_CLASSES) -> None:
    """Raise DataError that names the first of some labels, int64 [n], that is out of range."""
    wrong = ((labels < 0) | (labels >= classes)).nonzero()
    if len(wrong):
        number = int(wrong[0])
        raise DataError(f"--data {place}: {name(number)} has label {int(labels[number])}, not 0 to {classes - 1}")


def in_words(shape: tuple[int, ...]) -> str:
    """4 x 32 x 32."""
    return " x ".join(map(str, shape))


def in_line(error: BaseException) -> str:
    """An error on one line that is not long."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


@contextmanager
def damage(place: Path, name: object) -> Iterator[None]:
    """Raise DataError that names a file where something inside cannot read it.

    The decoders of zip, HDF5, LMDB, safetensors and torch raise many kinds; all mean that the file is damaged or of
    another kind.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise DataError(f"--data {place}: {name} cannot be read ({in_line(error)})") from None
