"""AutoencoderKL of diffusers: images to latents and back."""

import hashlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...data.dataset import LatentSpace
from ...data.latents.layout import Factor
from ...errors import ConfigError
from ...sampling.devices import copied

DECODED = 16
"""Latents that are decoded at a time."""
LARGEST = torch.finfo(torch.float32).max
SHOWN = 3
"""Names of weights that an error has room for."""


@dataclass
class VAE:
    """An encoder, and how a model takes what it makes."""

    name: str
    model: Any
    """diffusers' AutoencoderKL, in eval mode."""
    scale: Factor
    shift: Factor
    weights: str
    """SHA-256 of names and values of all weights."""

    def on(self, device: torch.device) -> "VAE":
        """The same on a device: itself, or a copy."""
        model = copied(self.model, device)
        return self if model is self.model else replace(self, model=model)

    @property
    def pixels(self) -> int:
        """Of an image, in each direction, that become one number of a channel of its latent."""
        return 2 ** (len(self.model.config.block_out_channels) - 1)

    def check_images(self, channels: int, size: int) -> None:
        """Raise ConfigError if it does not take images of a number of channels, `size` pixels high and wide."""
        takes, pixels = self.model.config.in_channels, self.pixels
        if takes != channels:
            raise ConfigError(f"--vae {self.name}: takes images of {takes} channels, these have {channels}")
        if size < pixels:
            raise ConfigError(f"--size {size}: --vae {self.name} takes images of {pixels} x {pixels} pixels or more")

    @torch.inference_mode()
    def encoded(self, x: Tensor) -> Tensor:
        """Mean || std of the posterior of images [n, C, H, W] in [-1, 1]: float32 [n, 2C, h, w]."""
        posterior = self.model.encode(x).latent_dist
        return torch.cat([posterior.mean, posterior.std], 1)

    @torch.inference_mode()
    def decoded(self, x: Tensor, space: LatentSpace) -> Tensor:
        """Images [n, C, H, W] in about [-1, 1] of a model's latents [n, C, h, w], on the device of the VAE.

        An image is the same to the bit however many others are decoded with it, as always as many are at a time.
        """
        weight = next(self.model.parameters())
        scale, shift = (torch.tensor(value, device=weight.device).view(-1, 1, 1) for value in space[1:])

        def images(part: Tensor) -> Tensor:
            filled = torch.cat([part, part[-1:].expand(DECODED - len(part), -1, -1, -1)])
            return self.model.decode(filled.to(weight) / scale + shift).sample[: len(part)]

        return torch.cat([images(part) for part in x.split(DECODED)])


def load_vae(name: str, device: torch.device, *, local: bool = False, channels: int = 0) -> VAE:
    """An AutoencoderKL by its name on the hub or its folder, from safetensors. Raises ConfigError.

    local: it must be on this machine. channels: those of the latents that it is to decode, 0: any.
    """
    flag = f"--vae {name}"
    kind = autoencoder_kl(flag)
    where: dict[str, Any] = {"local_files_only": local}
    if (Path(name) / "vae" / "config.json").is_file():
        where["subfolder"] = "vae"
    with _loading(flag):
        config: Any = kind.load_config(name, **where)
    if not isinstance(config, dict):
        raise ConfigError(f"{flag}: its config.json is no configuration")
    if config.get("_class_name", kind.__name__) != kind.__name__:
        raise ConfigError(f"{flag}: is of the class {str(config['_class_name'])[:40]}, not {kind.__name__}")
    with _loading(flag):
        model, found = kind.from_pretrained(
            name, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True, **where
        )
    for what, key in (("the file lacks", "missing_keys"), ("the configuration has no place for", "unexpected_keys")):
        if names := sorted(found[key]):
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            raise ConfigError(f"{flag}: {what} {', '.join(names[:SHOWN])}{more}")
    config = model.config
    if channels not in (0, config.latent_channels):
        raise ConfigError(f"{flag}: is of latents of {config.latent_channels} channels, not {channels}")
    scale, shift = factors(flag, config)
    return VAE(name, model.to(device).eval().requires_grad_(False), scale, shift, weights_digest(model))


@contextmanager
def _loading(flag: str) -> Iterator[None]:
    """Raise ConfigError in one line for whatever is raised inside."""
    try:
        with quiet():
            yield
    except Exception as error:  # diffusers, safetensors and the hub raise many kinds
        text = " ".join(str(error).split())
        raise ConfigError(f"{flag}: cannot be loaded ({type(error).__name__}: {text[:200]})") from None


def factors(flag: str, config: Any) -> tuple[Factor, Factor]:
    """Scale and shift of latents, by a VAE's configuration. Raises ConfigError, which begins with `flag`."""

    def number(field: str, value: Any, zero: bool = True) -> float:
        if type(value) not in (int, float) or not abs(value) <= LARGEST or not (zero or value):
            raise ConfigError(f"{flag}: {field} of its configuration makes no sense: {str(value)[:40]}")
        return float(value)

    def numbers(field: str, zero: bool = True) -> tuple[float, ...]:
        values = config[field]
        if not isinstance(values, list | tuple) or len(values) != config.latent_channels:
            raise ConfigError(f"{flag}: {field} of its configuration is no list of {config.latent_channels} numbers")
        return tuple(number(field, value, zero) for value in values)

    scale, shift = config.get("scaling_factor"), config.get("shift_factor")
    scale = 1.0 if scale is None else number("scaling_factor", scale, zero=False)
    if (
        config.get("latents_mean") is None or config.get("latents_std") is None
    ):  # one alone is not used, as in diffusers
        return scale, 0.0 if shift is None else number("shift_factor", shift)
    return tuple(scale / value for value in numbers("latents_std", zero=False)), numbers("latents_mean")


def autoencoder_kl(flag: str) -> Any:
    """The class of diffusers. Raises ConfigError, which names a flag, if that is not installed."""
    try:
        with quiet():
            from diffusers import AutoencoderKL
    except ImportError:
        raise ConfigError(f"{flag}: needs diffusers: pip install 'soflow-fast[hub]'") from None
    return AutoencoderKL


@contextmanager
def quiet() -> Iterator[None]:
    """No log line and no warning of diffusers and of what it imports: those of torchao are of no use to anybody."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)  # what is an error is raised as well
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 of names and values of all weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + b"\0")
        digest.update(value.contiguous().view(-1).view(torch.uint8).cpu().numpy())
    return digest.hexdigest()
