"""Samples of digits: are they their label, are they distributed like the data, are they copies."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.digits import load_digits, to_pixels
from ..errors import Diverged
from ..flow import SolutionFlow
from ..sampling import Devices, Drawing, draw_on
from .gaussian import frechet_distance
from .metrics import FEW

REAL = 1797
"""Digits that there are."""


class DigitScores(NamedTuple):
    """Figures of one set of digit samples against the 1797 real digits, pixels on the scale 0..16."""

    accuracy: float
    """Fraction classified as their label by an SVC(gamma=0.001, C=10) fitted on the real digits."""
    frechet: float
    """Frechet distance in pixel space (64 dimensions, covariances + 1e-3 I); two halves of the real digits: 16."""
    near_copies: float
    """Fraction within Euclidean distance 4 of a real digit."""


def digit_scores(x: Tensor, y: Tensor) -> DigitScores:
    """The figures of samples x [N, 1, 8, 8] in [-1, 1] with labels y [N]."""
    from sklearn.svm import SVC

    images, labels = load_digits()
    real, fake = to_pixels(images).numpy(), to_pixels(x.float().cpu()).numpy()
    judge = SVC(gamma=0.001, C=10)  # pyright: ignore[reportArgumentType]  # the default's type is all it sees
    judge.fit(real, labels.numpy())
    accuracy = float((judge.predict(fake) == y.cpu().numpy()).mean())
    parts = torch.from_numpy(fake).split(2**14)  # all distances at once would be 7 GB of a million samples
    nearest = torch.cat([torch.cdist(part, torch.from_numpy(real)).amin(1) for part in parts])
    return DigitScores(accuracy, frechet_distance(fake, real), float((nearest < 4).float().mean()))


def measure_digits(
    flow: SolutionFlow,
    n: int,
    nfe: int,
    seed: int,
    decode: Callable[[Tensor], Tensor] | None = None,
    several: Devices[tuple[Drawing, range]] | None = None,
    times: Sequence[float] | None = None,
    guidance: float | None = None,
) -> DigitScores:
    """The figures of n samples of a flow trained on the digits, labels 0..9 in turn, `nfe` network calls each.

    decode: makes images [n, 1, 8, 8] of samples that are latents. several: draw and decode in the flow's place, by its
    copies (`sampling.draw_on`). times: of the calls, falling from 1; None: evenly spaced. guidance: as for
    `sample`. Raises Diverged if the samples are not finite.
    """
    labels = torch.arange(n) % 10
    drawing = Drawing.of(flow, labels, nfe=nfe, times=times, seed=seed, guidance=guidance)
    batches = ((drawing, rows) for rows in drawing.batches())
    if several is None:
        device = next(flow.parameters()).device
        made = map(draw_on(flow, lambda device: decode)(device), batches)
    else:
        made = several.results(batches)
    images = []
    for finite, x in made:
        if not finite:
            raise Diverged(f"samples of {nfe} network calls are not finite: there is nothing to evaluate")
        images.append(x)
    return digit_scores(torch.cat(images), labels)


def about_digits(n: int) -> dict[str, Any]:
    """What stands beside the figures of n samples, as JSON values: the count, and what they are compared with."""
    return {"samples": n, "few": n < FEW, "reference": {"path": "digits", "images": REAL}}


def describe(nfe: int, scores: DigitScores, n: int) -> str:
    """One line of the figures of n samples, their count and reference. A count below 50 000 is said to be small."""
    few = f", fewer than {FEW}" if n < FEW else ""
    return (
        f"{nfe} step{'s' if nfe > 1 else ' '}: {scores.accuracy:.4f} classified as their label, "
        f"Frechet distance {scores.frechet:.1f}, {scores.near_copies:.4f} within distance 4 of a training image "
        f"({n} samples against {REAL} real digits{few})"
    )
