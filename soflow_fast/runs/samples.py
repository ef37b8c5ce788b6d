"""The samples of a run: grids and figures, on the way and at the end."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.schema import RunConfig
from ..data.conditions import Conditions
from ..data.dataset import LatentSpace
from ..errors import ConfigError, DataError
from ..evaluation import (
    NETWORKS,
    AgainstReference,
    Judge,
    about_digits,
    describe,
    judge_for,
    labels_in_turn,
    measure_digits,
    metrics_of,
    open_images,
)
from ..files import write_file
from ..sampling import Drawing, chosen_guidance, sample
from ..sampling.solving import usual_calls
from ..training.state import TrainState
from .images import has_colours, make_grid, npy, png, to_uint8
from .latents.vae import VAE, load_vae

GRID = 100
"""Images in a sample grid."""
EVALUATION_SAMPLES = 4000
"""Of an evaluation, if `run.eval_samples` does not say how many."""


class Grids:
    """The grids of a run: samples of the EMA weights in as few calls as usual, of the same noise and labels, or vectors
    of the data, every time.

    Latents are decoded by their VAE where it is on this machine and fits them, and else kept as they are, in .npy:
    they are no colours.
    """

    def __init__(
        self,
        state: TrainState,
        space: LatentSpace | None,
        say: Callable[[str], None],
        conditions: Conditions | None = None,
    ) -> None:
        """space: of latents; None: the samples are images. conditions: the data's, of a model that takes vectors."""
        self.state, self.space, self.conditions = state, space, conditions
        self.vae: VAE | None = None
        if space is not None and space.vae:
            try:
                self.vae = load_vae(space.vae, state.device, local=True, channels=state.config.model.in_channels)
            except ConfigError as error:
                say(f"samples are written as latents, in .npy: {str(error).removeprefix('--vae ')}")

    def decoded(self, x: Tensor) -> Tensor:
        """Images [n, C, H, W] of samples."""
        return x if self.vae is None or self.space is None else self.vae.decoded(x, self.space)

    def vectors(self, n: int) -> Tensor | None:
        """At most n of the data's, evenly spread, float32 [m, E]; None: the model takes none."""
        return None if self.conditions is None else self.conditions.some(n).float()

    def draw(self) -> tuple[str, bytes, Tensor | None]:
        """The ending of a file, its content, and the grid in it, uint8 [H, W, C]; None: it is of latents,
        float32 [100, C, h, w]."""
        model = self.state.config.model
        labels = labels_in_turn(self.state.ema, GRID, self.vectors(GRID))
        shape = (GRID, model.in_channels, model.input_size, model.input_size)
        x = sample(self.state.ema, labels, seed=0, shape=shape)
        if self.vae is None and (self.space is not None or not has_colours(model.in_channels)):
            return "npy", npy(x), None
        x = self.decoded(x)
        grid = make_grid(to_uint8(x).cpu(), columns=10)
        return "png", png(grid), grid


def check_evaluations(run: RunConfig) -> None:
    """Raise ConfigError or DataError, before a run begins, for what can be told soon of its reference and metrics."""
    if run.reference:
        try:
            Path(run.reference).stat()
        except OSError as error:
            raise DataError(f"--reference {run.reference}: {error.strerror}") from None
        try:
            metrics_of(run.metrics.split(","), NETWORKS)
        except ValueError as error:
            raise ConfigError(f"run.metrics: {error}") from None


class Evaluations:
    """The figures of a run's samples, on the way and at the end: against `run.reference`, or else those of digits.

    Args:
        state: whose average is sampled.
        grids: decode latents.
        first: whether this rank measures; others only take part in the drawing.
        at_work: is called after each batch.
        say: is told how the check of a reference goes on.

    Raises ConfigError and DataError for a reference that cannot be compared with.
    """

    def __init__(
        self,
        state: TrainState,
        grids: Grids,
        first: bool = True,
        at_work: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.state, self._grids = state, grids
        config, run = state.config, state.config.run
        latents_stay = config.data.latent and grids.vae is None
        self._of_digits = config.data.of_digits and config.model.num_classes > 0 and not latents_stay
        self.samples = run.eval_samples or EVALUATION_SAMPLES
        self._against: AgainstReference | None = None
        if run.eval_every and not self.wanted:
            what = "digits with labels, and with their VAE at hand,"
            raise ConfigError(f"--eval-every {run.eval_every}: without --reference PATH {what} alone are evaluated")
        if not run.reference:
            return
        if latents_stay:
            raise ConfigError(f"--reference {run.reference}: samples are latents, and their VAE is not on this machine")
        size = config.model.input_size if grids.vae is None else grids.vae.pixels * config.model.input_size
        if first:
            self._against = AgainstReference(
                state.ema,
                self._judge(size, at_work, say),
                self.samples,
                self._shape(),
                self._finish_on,
                vectors=grids.vectors(self.samples),
            )

    def _shape(self) -> tuple[int, int, int]:
        model = self.state.config.model
        return model.in_channels, model.input_size, model.input_size

    def _finish_on(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        return lambda x: to_uint8(self._grids.decoded(x)).permute(0, 3, 1, 2)

    def _judge(self, size: int, at_work: Callable[[], None], say: Callable[[str], None]) -> Judge:
        run = self.state.config.run
        reference = open_images(run.reference, flag="--reference ", size=size, say=say)
        weights = {"inception": run.inception, "dinov2": run.dinov2}
        try:
            return judge_for(
                reference, run.metrics, [self.state.device], **weights, threads=False, tick=lambda *_: at_work()
            )
        except ConfigError as error:  # the flags are those of `evaluate`
            raise ConfigError(re.sub(r"^--(metrics|inception|dinov2)\b", r"run.\1", str(error))) from None

    @property
    def wanted(self) -> bool:
        """Whether there is something to measure by."""
        return bool(self.state.config.run.reference) or self._of_digits

    def on_the_way(self) -> tuple[str, dict[int, dict[str, float]]]:
        """The figures of samples in as few calls as usual, as a line and as `evaluate` returns them."""
        nfe = usual_calls(self.state.ema)
        line, figures = self.at(nfe)
        return line, {nfe: figures}

    def at(self, nfe: int) -> tuple[str, dict[str, float]]:
        """The figures of samples of `nfe` network calls, as a line and by name; nothing of a rank that only draws."""
        if self._against is not None:
            return self._against.at(nfe, None, seed=0)
        if not self.state.config.run.reference:
            scores = measure_digits(self.state.ema, self.samples, nfe, seed=0, decode=self._grids.decoded)
            return describe(nfe, scores, self.samples), scores._asdict()
        y = labels_in_turn(self.state.ema, self.samples, self._grids.vectors(self.samples))
        drawing = Drawing.of(self.state.ema, y, nfe=nfe, seed=0, shape=(self.samples, *self._shape()))
        for rows in drawing.batches():
            drawing.batch(self.state.ema, rows)
        return "", {}

    def about(self) -> dict[str, Any]:
        """What stands beside the figures in evaluation.json; nothing of a rank that only draws."""
        if self._against is not None:
            return self._against.about()
        return {} if self.state.config.run.reference else about_digits(self.samples)


def evaluate(evaluations: Evaluations, run_dir: Path | None, say: Callable[[str], None]) -> dict[int, dict[str, float]]:
    """Print the figures of samples drawn with 1 and with 2 network calls, and keep them in evaluation.json.

    Of a flow that has learned the velocity alone: with as many calls as usual. Returns the figures by name, for each
    number of calls.

    run_dir: None of a rank that only takes part in the drawing."""
    ema, figures = evaluations.state.ema, {}
    guidance = chosen_guidance(ema, None)
    say(f"evaluating {evaluations.samples} samples{'' if guidance is None else f' at guidance {guidance:g}'}")
    for nfe in (1, 2) if ema.solves else (usual_calls(ema),):
        line, figures[nfe] = evaluations.at(nfe)
        if line:
            say(line)
    content = {"step": evaluations.state.step, **evaluations.about(), "nfe": figures}
    if guidance is not None:
        content["guidance"] = guidance
    if run_dir is not None:
        write_file(run_dir / "evaluation.json", (json.dumps(content, indent=2) + "\n").encode(), synced=False)
    return figures
