"""SoFlow (arXiv 2512.15657): training one-step image generators from scratch, fast. Public names load on first use."""

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .checkpoint import export, load
    from .config import Config, DiTConfig, ObjectiveConfig
    from .flow import SolutionFlow
    from .increments import paired_forward
    from .model import DiT
    from .objective import LossTerm, Objective
    from .official import load_official
    from .one_step import OneStep
    from .presets import preset
    from .rng import generator
    from .sampling import sample
    from .state import TrainState
    from .step import train_step

_HOMES = {
    "Config": "config",
    "DiT": "model",
    "DiTConfig": "config",
    "LossTerm": "objective",
    "Objective": "objective",
    "ObjectiveConfig": "config",
    "OneStep": "one_step",
    "SolutionFlow": "flow",
    "TrainState": "state",
    "export": "checkpoint",
    "generator": "rng",
    "load": "checkpoint",
    "load_official": "official",
    "paired_forward": "increments",
    "preset": "presets",
    "sample": "sampling",
    "train_step": "step",
}

__all__ = [
    "Config",
    "DiT",
    "DiTConfig",
    "LossTerm",
    "Objective",
    "ObjectiveConfig",
    "OneStep",
    "SolutionFlow",
    "TrainState",
    "__version__",
    "export",
    "generator",
    "load",
    "load_official",
    "paired_forward",
    "preset",
    "sample",
    "train_step",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'soflow_fast' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value
