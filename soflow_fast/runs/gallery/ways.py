"""The way of noise to images through a trained network: f(x_1, 1, s) for s from 1 to 0, or steps along a velocity."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ...errors import CheckpointError, ConfigError, UserError
from ...flow import SolutionFlow
from ...sampling.drawing import has_null_label, image_noise
from ...sampling.guidance import chosen_guidance, scales
from ..checkpoint import load_with_data
from ..images import has_colours, to_uint8
from ..latents.vae import load_vae
from .pictures import cell

TIMES = 11
"""Times s from 1 to 0, evenly spaced."""
ROWS = 5
"""Labels, and seeds, of which a way is shown."""
IN_A_BATCH = 16


@dataclass(frozen=True)
class Ways:
    """Ways, each an image at every time as a data URI."""

    times: list[float]
    by_label: list[tuple[str, list[str]]]
    """Of one noise, under several labels, each by its name."""
    by_seed: list[tuple[str, list[str]]]
    """Of several noises, under one label."""
    label: str
    """That label."""
    step: int
    """Of the checkpoint; 0: not known."""
    solves: bool
    """Whether each image is one call from the noise; else each is Euler's step from the one before, along the velocity
    that such a flow has learned."""


def ways(run_dir: Path, device: torch.device) -> Ways:
    """Draw the ways of the newest whole checkpoint of a run, by its averaged weights.

    Raises UserError, in one line, where there is no checkpoint, or where its latents' VAE is not on this machine.
    """
    flow, config, data = load_with_data(run_dir, device)
    model = config.model
    finish: Callable[[Tensor], Tensor] = lambda x: x  # noqa: E731
    if config.data.latent or not has_colours(model.in_channels):
        space = data.space if data is not None else None
        if space is None or not space.vae:
            raise CheckpointError("its latents do not say of which VAE they are")
        vae = load_vae(space.vae, device, local=True, channels=model.in_channels)
        finish = partial(vae.decoded, space=space)
    names = data.classes if data is not None and len(data.classes) == model.num_classes else ()
    named = lambda label: names[label] if names else str(label)  # noqa: E731
    classes = model.num_classes
    labels = [round(k * (classes - 1) / (ROWS - 1)) for k in range(ROWS)] if classes >= ROWS else [*range(classes)]
    if not labels and not has_null_label(flow):
        raise ConfigError("it has neither classes nor a null label")
    chosen = labels[len(labels) // 2] if labels else classes
    rows = [(0, label) for label in labels] + [(seed, chosen) for seed in range(ROWS)]
    shape = (model.in_channels, model.input_size, model.input_size)
    noise = torch.stack([image_noise(seed, 0, 0, shape) for seed, _ in rows])  # as of `sample --seed`
    y = None if model.condition_size else torch.tensor([label for _, label in rows])  # vectors: of no condition
    at = range(0, len(rows), IN_A_BATCH)
    parts = [(noise[k : k + IN_A_BATCH], None if y is None else y[k : k + IN_A_BATCH]) for k in at]
    times, drawn = [1 - k / (TIMES - 1) for k in range(TIMES)], torch.cat([_states(flow, *part) for part in parts])
    if not torch.isfinite(drawn).all():
        raise UserError("its samples are not finite")
    with torch.no_grad():
        cells = [[cell(image) for image in to_uint8(finish(way.to(device))).cpu()] for way in drawn]
    return Ways(
        times=[round(s, 3) for s in times],
        by_label=[(named(label), cells[k]) for k, label in enumerate(labels)],
        by_seed=[(f"seed {seed}", cells[len(labels) + seed]) for seed in range(ROWS)],
        label=named(chosen) if labels else "",
        step=getattr(flow.origin, "step", None) or 0,
        solves=flow.solves,
    )


@torch.no_grad()
def _states(flow: SolutionFlow, noise: Tensor, y: Tensor | None) -> Tensor:
    """The states [n, TIMES, C, H, W] of noise [n, C, H, W] of labels [n], None: null ones, at all times, on the CPU."""
    parameter = next(flow.parameters())
    x, y = noise.to(parameter), None if y is None else y.to(parameter.device)
    w = scales(flow, chosen_guidance(flow, None), y, x)
    at = lambda k: torch.full((len(x),), 1 - k / (TIMES - 1), device=x.device, dtype=x.dtype)  # noqa: E731
    states = [x]
    for k in range(1, TIMES):
        states.append(flow(x, at(0), at(k), y, w) if flow.solves else flow(states[-1], at(k - 1), at(k), y, w))
    return torch.stack(states, 1).float().cpu()
