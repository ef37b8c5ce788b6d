"""AutoencoderKL of diffusers: images to latents and back."""

import copy
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

from ..data.dataset import LatentSpace
from ..data.latents.layout import Factor
from ..errors import ConfigError

DECODED = 16
"""Latents that are decoded at a time."""


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
        if next(self.model.parameters()).device == device:
            return self
        return replace(self, model=copy.deepcopy(self.model).to(device))

    @torch.inference_mode()
    def encoded(self, x: Tensor) -> Tensor:
        """Mean || std of the posterior of images [n, C, H, W] in [-1, 1]: float32 [n, 2C, h, w]."""
        posterior = self.model.encode(x).latent_dist
        return torch.cat([posterior.mean, posterior.std], 1)

    @torch.inference_mode()
    def decoded(self, x: Tensor, space: LatentSpace) -> Tensor:
        """Images [n, C, H, W] in about [-1, 1] of a model's latents [n, C, h, w], on the device of the VAE."""
        weight = next(self.model.parameters())
        scale, shift = (torch.tensor(value, device=weight.device).view(-1, 1, 1) for value in space[1:])
        parts = [part.to(weight) / scale + shift for part in x.split(DECODED)]
        return torch.cat([self.model.decode(part).sample for part in parts])


def load_vae(name: str, device: torch.device, *, local: bool = False) -> VAE:
    """An AutoencoderKL by its name on the hub or its folder, from safetensors. Raises ConfigError.

    local: it must be on this machine.
    """
    kind = autoencoder_kl(f"--vae {name}")
    below = {"subfolder": "vae"} if (Path(name) / "vae" / "config.json").is_file() else {}
    try:
        with _quiet():
            model: Any = kind.from_pretrained(
                name, use_safetensors=True, low_cpu_mem_usage=False, local_files_only=local, **below
            )
    except Exception as error:  # diffusers, safetensors and the hub raise many kinds
        text = " ".join(str(error).split())
        raise ConfigError(f"--vae {name}: cannot be loaded ({type(error).__name__}: {text[:200]})") from None
    config = model.config
    scale, shift = config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        scale, shift = tuple(scale / float(value) for value in std), tuple(map(float, mean))
    weights = _digest(model)
    return VAE(name, model.to(device).eval().requires_grad_(False), scale, shift, weights)


def autoencoder_kl(flag: str) -> Any:
    """The class of diffusers. Raises ConfigError, which names a flag, if that is not installed."""
    try:
        with _quiet():
            from diffusers import AutoencoderKL
    except ImportError:
        raise ConfigError(f"{flag}: needs diffusers: pip install 'soflow-fast[hub]'") from None
    return AutoencoderKL


@contextmanager
def _quiet() -> Iterator[None]:
    """No log line and no warning of diffusers and of what it imports: those of torchao are of no use to anybody."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)  # what is an error is raised as well
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _digest(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + b"\0")
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
