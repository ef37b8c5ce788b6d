"""SoFlow (arXiv 2512.15657): training one-step image generators from scratch, fast. Public names load on first use."""

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .config.presets import preset
    from .config.schema import Config, DiTConfig, ObjectiveConfig, UNetConfig
    from .flow import SolutionFlow
    from .hub import from_pretrained, push_to_hub, save_pretrained
    from .models.dit import DiT
    from .models.official import load_official
    from .models.paired_forward import paired_forward
    from .models.unet import UNet
    from .objective import LossTerm, Objective
    from .rng import generator
    from .runs.checkpoint import export, load
    from .runs.policies import load_policy
    from .sampling import OneStep, sample
    from .training.state import TrainState
    from .training.step import Draws, draw, train_step

_HOMES = {
    "Config": "config.schema",
    "DiT": "models.dit",
    "DiTConfig": "config.schema",
    "Draws": "training.step",
    "LossTerm": "objective",
    "Objective": "objective",
    "ObjectiveConfig": "config.schema",
    "OneStep": "sampling",
    "SolutionFlow": "flow",
    "TrainState": "training.state",
    "UNet": "models.unet",
    "UNetConfig": "config.schema",
    "draw": "training.step",
    "export": "runs.checkpoint",
    "from_pretrained": "hub",
    "generator": "rng",
    "load": "runs.checkpoint",
    "load_official": "models.official",
    "load_policy": "runs.policies",
    "paired_forward": "models.paired_forward",
    "preset": "config.presets",
    "push_to_hub": "hub",
    "sample": "sampling",
    "save_pretrained": "hub",
    "train_step": "training.step",
}

__all__ = [
    "Config",
    "DiT",
    "DiTConfig",
    "Draws",
    "LossTerm",
    "Objective",
    "ObjectiveConfig",
    "OneStep",
    "SolutionFlow",
    "TrainState",
    "UNet",
    "UNetConfig",
    "__version__",
    "draw",
    "export",
    "from_pretrained",
    "generator",
    "load",
    "load_official",
    "load_policy",
    "paired_forward",
    "preset",
    "push_to_hub",
    "sample",
    "save_pretrained",
    "train_step",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'soflow_fast' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value
