"""Presets: functions that return whole configurations. `preset(name)` is the way in."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..errors import ConfigError
from .schema import (
    Config,
    DataConfig,
    DiTConfig,
    ObjectiveConfig,
    OptimConfig,
    PolicyConfig,
    RunConfig,
    UNetConfig,
    nearest,
    override,
    shown,
)


def digits() -> Config:
    """Handwritten digits, 8 x 8, labelled: trains in about two minutes on two CPU cores.

    Found by trial at a fixed amount of work. What mattered, in this order: end times near 0 and starts near 1 for the
    consistency loss, as one-step sampling asks for f(x, 1, 0) (Frechet distance 40 -> 29); a learning rate of 4e-3;
    small batches and many steps. More guidance raises the accuracy and the distance.
    """
    return Config(
        preset="digits",
        model=DiTConfig(
            input_size=8, patch_size=4, in_channels=1, hidden_size=128, depth=4, num_heads=4, num_classes=10
        ),
        objective=ObjectiveConfig(
            guidance_scale=1.1,
            guidance_decay_time=1.0,
            mix_ratio=1.0,
            r_end=0.01,
            fm_fraction=0.5,
            sc_time=(0.8, 1.2),
            sc_end_time=(-2.0, 1.2),
        ),
        optim=OptimConfig(lr=4e-3, lr_schedule="cosine", ema_decay=0.995),
        data=DataConfig(kind="digits"),
        run=RunConfig(log_every=10, sample_every=500, checkpoint_every=1000),
        steps=3000,
        batch_size=64,
    )


def digits_latent() -> Config:
    """The digits as latents [4, 4, 4] of a VAE that is trained on them first; as many tokens as `digits`."""
    config = digits()
    model = replace(config.model, input_size=4, patch_size=2, in_channels=4)
    return replace(config, preset="digits-latent", model=model, data=DataConfig(kind="digits-latent"))


def cifar10() -> Config:
    """CIFAR-10 photographs, 32 x 32, labelled, from a folder or zip: a DiT of the S size, for one GPU."""
    return Config(
        preset="cifar10",
        model=DiTConfig.named("S/2", input_size=32, in_channels=3, num_classes=10),
        objective=ObjectiveConfig(guidance_scale=2.0),
        optim=OptimConfig(lr=4e-4, lr_schedule="cosine", warmup_steps=500, grad_clip=1.0, ema_warmup=True),
        data=DataConfig(kind="images", flip=True),
        run=RunConfig(log_every=50, sample_every=2000, checkpoint_every=5000),
        steps=100_000,
        batch_size=256,
    )


def cifar10_unet() -> Config:
    """CIFAR-10 photographs, 32 x 32, without labels: EDM's U-Net by SoFlow's recipe for it (arXiv 2512.15657).

    The recipe is the published one: no flow-matching part, RAdam, 800 k steps of 1024 images, the average accumulated
    every 16 steps in float64. The rate, its betas and the decay of the average are those of the public ImageNet
    recipe; the augmentation is EDM's for CIFAR-10 (arXiv 2206.00364).
    """
    return Config(
        preset="cifar10-unet",
        model=UNetConfig(),
        objective=ObjectiveConfig(
            guidance_scale=1.0,
            guidance_decay_time=1.0,
            mix_ratio=1.0,
            label_drop=0.0,
            p=0.75,
            eps=1e-3,
            r_init=1.0,
            r_end=0.0003125,
            fm_fraction=0.0,
            fm_time=(-0.9, 1.6),
            sc_end_time=(-4.0, 1.6),
            sc_time=(-0.9, 1.6),
        ),
        optim=OptimConfig(kind="radam", ema_every=16, ema_precision="fp64"),
        data=DataConfig(kind="images", augment=0.12),
        run=RunConfig(log_every=100, sample_every=5000, checkpoint_every=5000),
        steps=800_000,
        batch_size=1024,
    )


GUIDANCE = {"B/4": 3.0, "B/2": 2.5, "M/2": 2.25, "L/2": 2.0, "XL/2": 2.0}
"""Guidance scale by size: of B/4 by the public configuration file, else by the paper (arXiv 2512.15657)."""
STEPS = {"B/4": 400_000}
"""Steps by size; of the others 240 epochs of ImageNet's 1.28 M images in batches of 256."""


def imagenet256(size: str, card: int = 0, micro_batch: int = 0) -> Config:
    """The recipe on ImageNet 256 x 256 latents (SD-VAE ft-mse, 32 x 32 x 4), at one of the public DiT sizes.

    card: gigabytes (2^30 bytes) of a GPU's memory. `micro_batch` is then the largest power of two whose step is
    predicted to stay within nine tenths of them (`estimate_memory`).
    """
    return Config(
        preset=f"imagenet256-{size.lower().replace('/', '')}" + (f"-{card}gb" if card else ""),
        model=DiTConfig.named(size),
        objective=ObjectiveConfig(guidance_scale=GUIDANCE[size]),
        data=DataConfig(kind="latents"),
        run=RunConfig(log_every=100, sample_every=5000, checkpoint_every=5000),
        steps=STEPS.get(size, 1_200_000),
        micro_batch=micro_batch,
    )


def policy() -> Config:
    """Chunks of actions for gymnasium's pendulum, learned of a scripted expert: about two minutes on two CPU cores.

    `--data obstacle` is a task with two good ways whose mean is none, `--data FOLDER` a LeRobot data set. Times as for
    the digits, as one step asks for the solution from noise to action.
    """
    return Config(
        preset="policy",
        model=PolicyConfig(),
        objective=ObjectiveConfig(
            guidance_scale=1.0,
            label_drop=0.0,
            r_end=0.01,
            p=0.5,
            fm_fraction=0.1,
            sc_time=(0.8, 1.2),
            sc_end_time=(-2.0, 1.2),
        ),
        optim=OptimConfig(lr=2e-3, lr_schedule="cosine", ema_decay=0.999, ema_warmup=True),
        data=DataConfig(kind="demonstrations", path="pendulum"),
        run=RunConfig(log_every=50, sample_every=1000, checkpoint_every=1000),
        steps=3000,
        batch_size=256,
        precision="fp32",
    )


def preset(name: str, **changes: Any) -> Config:
    """The preset `name` with some fields replaced, by short name (`precision="fp32"`) or by full name given as
    `**{"objective.eps": 0.1}`. Raises ConfigError naming what is unknown."""
    if name not in PRESETS:
        raise ConfigError(
            f"unknown preset {shown(name)}{nearest(str(name), PRESETS)}; the presets are {', '.join(PRESETS)}"
        )
    try:
        return override(PRESETS[name](), changes)
    except ValueError as error:
        raise ConfigError(str(error)) from None


PRESETS: dict[str, Callable[[], Config]] = {
    "digits": digits,
    "digits-latent": digits_latent,
    "cifar10": cifar10,
    "cifar10-unet": cifar10_unet,
    "policy": policy,
    "imagenet256-b4": lambda: imagenet256("B/4"),
    "imagenet256-b2": lambda: imagenet256("B/2"),
    "imagenet256-m2": lambda: imagenet256("M/2"),
    "imagenet256-l2": lambda: imagenet256("L/2"),
    "imagenet256-xl2": lambda: imagenet256("XL/2"),
    "imagenet256-b2-8gb": lambda: imagenet256("B/2", 8, 64),
    "imagenet256-l2-12gb": lambda: imagenet256("L/2", 12, 8),
    "imagenet256-xl2-24gb": lambda: imagenet256("XL/2", 24, 32),
    "imagenet256-xl2-80gb": lambda: imagenet256("XL/2", 80, 256),
}
