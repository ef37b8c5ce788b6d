"""Latents of the handwritten digits, by a VAE that is trained on them first: the whole way of latents, with real parts,
in a minute and without a download.

The VAE is diffusers' AutoencoderKL, of images [1, 8, 8] to latents [4, 4, 4]. Its loss is the negative bound on the log
likelihood (Kingma and Welling 2014, equation 10) of a normal distribution of the pixels, with its Kullback-Leibler term
times `KL_WEIGHT`, as small as in latent diffusion (Rombach et al. 2022, section 3.1).
"""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config.schema import Config
from ..data.digits import digits
from ..data.latents import is_whole
from ..errors import storage
from ..rng import generator
from ..training.precision import resolve_device
from .checkpoint import whole_directory
from .encoding import encode
from .vae import autoencoder_kl, load_vae

STEPS = 1000
BATCH = 64
LR = 3e-3
KL_WEIGHT = 1e-3
ENCODED = 512
"""Images that are encoded at a time."""
CHANNELS = 4
SIZE = 4
"""Height and width of a latent."""


def prepare(config: Config, say: Callable[[str], None]) -> Config:
    """The configuration with `data.path`, a folder that then holds `vae` and `latents`; what is missing is made.

    By default it lies beside the run's directory. Raises ConfigError without diffusers, DataError and StorageError.
    """
    place = Path(config.data.path or f"{config.run.run_dir}-data")
    vae, latents = place / "vae", place / "latents"
    if not is_whole(latents):
        device = resolve_device(config.run.device)
        if not vae.exists():
            model = train_vae(config.seed, device, say)
            with storage(f"cannot write to {vae}"), whole_directory(vae) as folder:
                model.save_pretrained(folder)
        encode(digits(), latents, load_vae(str(vae), device), size=8, flip=False, batch_size=ENCODED, devices=[device])
    return replace(config, data=replace(config.data, path=str(place)))


def train_vae(seed: int, device: torch.device, say: Callable[[str], None], steps: int = STEPS) -> Any:
    """An AutoencoderKL of the digits, in eval mode on the CPU; mean and deviation of its latents, by channel, are in
    its configuration. The same arguments and versions give the same weights. Raises ConfigError without diffusers."""
    model = _network(seed).to(device)
    images = digits().images.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.99), weight_decay=0.01)
    began, error = time.monotonic(), math.inf
    say(f"training a VAE on the digits, {steps} steps")
    for step in range(steps):
        source = generator(seed, step, 0, "digits vae")
        x = images[torch.randint(len(images), (BATCH,), generator=source)]
        eps = torch.randn(BATCH, CHANNELS, SIZE, SIZE, generator=source).to(device)
        posterior = model.encode(x).latent_dist
        difference = model.decode(posterior.mean + posterior.std * eps).sample - x
        loss = difference.square().sum((1, 2, 3)).mean() / 2 + KL_WEIGHT * posterior.kl().mean()
        optimizer.param_groups[0]["lr"] = LR * min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        error = difference.detach().square().mean()
    model.eval()
    mean, std = _statistics(model, images)
    model.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    say(f"VAE trained in {time.monotonic() - began:.0f} s; squared error of the pixels in [-1, 1]: {float(error):.4f}")
    return model.cpu()


def _network(seed: int) -> Any:
    kind = autoencoder_kl("digits --latent")
    with torch.device("meta"):
        model = kind(
            in_channels=1,
            out_channels=1,
            sample_size=8,
            latent_channels=CHANNELS,
            scaling_factor=1.0,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            mid_block_add_attention=False,
        )
    model, source = model.to_empty(device="cpu"), generator(seed, 0, 0, "digits vae initialisation")
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):  # as they do it by themselves, but from a generator
            bound = 1 / math.sqrt(layer.weight[0].numel())
            for value in layer.parameters():
                nn.init.uniform_(value, -bound, bound, generator=source)
        elif isinstance(layer, nn.GroupNorm):
            layer.reset_parameters()
    return model


@torch.no_grad()
def _statistics(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents of all images, by channel: of samples of their posteriors."""
    posterior = model.encode(images).latent_dist
    mean = posterior.mean.mean((0, 2, 3))
    variance = posterior.mean.var((0, 2, 3), correction=0) + posterior.var.mean((0, 2, 3))
    return mean.cpu(), variance.sqrt().cpu()
