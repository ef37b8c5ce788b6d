"""The samples of a run: grids on the way, and figures at the end."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..evaluation import DigitScores, describe, measure_digits
from ..files import write_file
from ..sampling import sample
from ..training.state import TrainState
from .images import make_grid, to_uint8

GRID = 100
"""Images in a sample grid."""
EVALUATION_SAMPLES = 4000


def draw_grid(state: TrainState) -> Tensor:
    """A grid, uint8 [H, W, C], of one-step samples of the EMA weights; the same noise and labels every time."""
    model = state.config.model
    labels = torch.arange(GRID) % max(model.num_classes, 1) if model.num_classes else None
    shape = (GRID, model.in_channels, model.input_size, model.input_size)
    return make_grid(to_uint8(sample(state.ema, labels, seed=0, shape=shape)), columns=10)


def evaluate(state: TrainState, run_dir: Path, say: Callable[[str], None]) -> dict[int, DigitScores]:
    """Print the figures of 4000 digits drawn with 1 and with 2 network calls, and keep them in evaluation.json."""
    figures = {}
    say(f"evaluating {EVALUATION_SAMPLES} samples")
    for nfe in (1, 2):
        figures[nfe] = measure_digits(state.ema, EVALUATION_SAMPLES, nfe, seed=0)
        say(describe(nfe, figures[nfe]))
    content = {"step": state.step, "samples": EVALUATION_SAMPLES, "nfe": {k: v._asdict() for k, v in figures.items()}}
    write_file(run_dir / "evaluation.json", (json.dumps(content, indent=2) + "\n").encode(), synced=False)
    return figures
