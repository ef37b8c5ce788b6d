"""The networks and batches that are timed."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from soflow_fast.config.presets import preset
from soflow_fast.config.schema import Config, DataConfig, DiTConfig, RunConfig
from soflow_fast.data import open_source
from soflow_fast.rng import generator
from soflow_fast.training.state import build_flow


class Case(NamedTuple):
    """One network and batch."""

    name: str
    config: Config

    def describe(self) -> str:
        """The sizes, in words."""
        m = self.config.dit
        tokens = (m.input_size // m.patch_size) ** 2
        return f"{self.name}: hidden {m.hidden_size}, depth {m.depth}, {tokens} tokens, batch {self.config.batch_size}"

    def at(self, batch: int) -> "Case":
        """The same network on another batch."""
        return self._replace(config=replace(self.config, batch_size=batch))

    def parameters(self) -> int:
        """Numbers in the network."""
        return sum(p.numel() for p in build_flow(self.config).parameters())

    def batch(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images and labels on the device: the digits themselves, random numbers in place of latents."""
        if self.config.data.latent:
            return random_batch(self.config, device)
        x0, y = open_source(self.config).batch(0)
        return x0.to(device), y.to(device)


def random_batch(config: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """Normal images and uniform labels for the network of `config`, the same on every device."""
    model = config.model
    source = generator(config.seed, 0, 0, "benchmark batch")
    x0 = torch.randn(config.batch_size, *model.sample_shape, generator=source)
    y = torch.randint(model.num_classes, (config.batch_size,), generator=source)
    return x0.to(device), y.to(device)


def cpu_cases() -> list[Case]:
    """Small enough for two cores: the default preset as shipped, and the public recipe on a small network."""
    small = Config(
        preset="small",
        model=DiTConfig(input_size=16, patch_size=2, in_channels=4, hidden_size=384, depth=6, num_heads=6),
        data=DataConfig(kind="latents"),
        run=RunConfig(device="cpu"),
        batch_size=8,
    )
    return [Case("digits", preset("digits", device="cpu")), Case("small DiT", small)]


def public(size: str, batch: int) -> Case:
    """A public size with the public recipe, on a GPU."""
    return Case(f"DiT-{size}", preset(f"imagenet256-{size.lower().replace('/', '')}", device="cuda", batch_size=batch))


def gpu_cases() -> list[Case]:
    """Public sizes at the public batch, most worth first."""
    return [public("XL/2", 256), public("B/2", 256)]


def small_batches() -> list[Case]:
    """Public sizes at a batch where launches weigh as much as work: they compare hosts as much as GPUs."""
    return [public("B/4", 32), public("B/2", 32)]


def cases() -> list[Case]:
    """The networks that this machine can time."""
    return gpu_cases() if torch.cuda.is_available() else cpu_cases()
