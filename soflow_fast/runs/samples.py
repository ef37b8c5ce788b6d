"""The samples of a run: grids on the way, and figures at the end."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..data.dataset import LatentSpace
from ..errors import ConfigError
from ..evaluation import DigitScores, describe, measure_digits
from ..files import write_file
from ..sampling import chosen_guidance, sample
from ..sampling.solving import usual_calls
from ..training.state import TrainState
from .images import has_colours, make_grid, npy, png, to_uint8
from .latents.vae import VAE, load_vae

GRID = 100
"""Images in a sample grid."""
EVALUATION_SAMPLES = 4000


class Grids:
    """The grids of a run: samples of the EMA weights in as few calls as usual, of the same noise and labels every time.

    Latents are decoded by their VAE where it is on this machine and fits them, and else kept as they are, in .npy:
    they are no colours.
    """

    def __init__(self, state: TrainState, space: LatentSpace | None, say: Callable[[str], None]) -> None:
        """space: of latents; None: the samples are images."""
        self.state, self.space = state, space
        self.vae: VAE | None = None
        if space is not None and space.vae:
            try:
                self.vae = load_vae(space.vae, state.device, local=True, channels=state.config.model.in_channels)
            except ConfigError as error:
                say(f"samples are written as latents, in .npy: {str(error).removeprefix('--vae ')}")

    def decoded(self, x: Tensor) -> Tensor:
        """Images [n, C, H, W] of samples."""
        return x if self.vae is None or self.space is None else self.vae.decoded(x, self.space)

    def draw(self) -> tuple[str, bytes, Tensor | None]:
        """The ending of a file, its content, and the grid in it, uint8 [H, W, C]; None: it is of latents,
        float32 [100, C, h, w]."""
        model = self.state.config.model
        labels = torch.arange(GRID) % max(model.num_classes, 1) if model.num_classes else None
        shape = (GRID, model.in_channels, model.input_size, model.input_size)
        x = sample(self.state.ema, labels, seed=0, shape=shape)
        if self.vae is None and (self.space is not None or not has_colours(model.in_channels)):
            return "npy", npy(x), None
        x = self.decoded(x)
        grid = make_grid(to_uint8(x).cpu(), columns=10)
        return "png", png(grid), grid


def evaluate(
    state: TrainState,
    run_dir: Path | None,
    say: Callable[[str], None],
    decode: Callable[[Tensor], Tensor] | None = None,
) -> dict[int, DigitScores]:
    """Print the figures of 4000 digits drawn with 1 and with 2 network calls, and keep them in evaluation.json.

    Of a flow that has learned the velocity alone: with as many calls as usual.

    run_dir: None of a rank that only takes part in the drawing.
    decode: makes images of samples that are latents."""
    figures, guidance = {}, chosen_guidance(state.ema, None)
    say(f"evaluating {EVALUATION_SAMPLES} samples{'' if guidance is None else f' at guidance {guidance:g}'}")
    for nfe in (1, 2) if state.ema.solves else (usual_calls(state.ema),):
        figures[nfe] = measure_digits(state.ema, EVALUATION_SAMPLES, nfe, seed=0, decode=decode)
        say(describe(nfe, figures[nfe]))
    content = {"step": state.step, "samples": EVALUATION_SAMPLES, "nfe": {k: v._asdict() for k, v in figures.items()}}
    if guidance is not None:
        content["guidance"] = guidance
    if run_dir is not None:
        write_file(run_dir / "evaluation.json", (json.dumps(content, indent=2) + "\n").encode(), synced=False)
    return figures
