"""A small U-Net and its runs, for tests."""

from typing import Any

import torch

from soflow_fast import TrainState, preset, train_step
from soflow_fast.config.schema import Config
from soflow_fast.models.unet import UNet

FIELDS: dict[str, Any] = {
    "model.input_size": 8,
    "model.channels": 16,
    "model.multipliers": (1, 2),
    "model.blocks": 1,
    "model.attention_sizes": (4,),
    "batch_size": 4,
    "steps": 12,
    "optim.ema_every": 2,
    "optim.lr": 1e-2,
    "device": "cpu",
    "checkpoint_every": 0,
    "run.sample_every": 0,
}


def config(**changes: Any) -> Config:
    """The preset, of a network with two levels on images of 8 x 8."""
    return preset("cifar10-unet", **{**FIELDS, **changes})


def build(**changes: Any) -> TrainState:
    return TrainState.build(config(**changes))


@torch.no_grad()
def roughened(network: UNet) -> UNet:
    """The same network off its initial weights, of which every branch ends in almost nothing."""
    for k, p in enumerate(network.parameters()):
        p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(k)).to(p.device))
    return network


def images(step: int, n: int = 4) -> torch.Tensor:
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(step)) * 2 - 1


def advance(state: TrainState, steps: int) -> TrainState:
    """Some updates on images that depend on the step alone."""
    for _ in range(steps):
        train_step(state, images(state.step, state.config.batch_size), None)
    return state
