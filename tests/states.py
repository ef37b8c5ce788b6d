"""Small training states, and checkpoints of them, for the tests of checkpoints."""

from pathlib import Path
from typing import Any

import torch

from soflow_fast import TrainState, preset, train_step
from soflow_fast.runs import checkpoint

FIELDS: dict[str, Any] = {
    "model.hidden_size": 16,
    "model.depth": 1,
    "model.num_heads": 2,
    "batch_size": 4,
    "steps": 20,
    "device": "cpu",
}


def build(**changes: Any) -> TrainState:
    """The state before its first step."""
    return TrainState.build(preset("digits", **{**FIELDS, **changes}))


def advance(state: TrainState, steps: int) -> TrainState:
    """Some updates on data that depends on the step alone."""
    for _ in range(steps):
        source = torch.Generator().manual_seed(state.step)
        train_step(state, torch.rand(4, 1, 8, 8, generator=source) * 2 - 1, torch.arange(4))
    return state


def save_two(folder: Path) -> Path:
    """A run directory with checkpoints of steps 1 and 2."""
    state = build()
    for _ in range(2):
        checkpoint.save(folder, advance(state, 1))
    return folder
