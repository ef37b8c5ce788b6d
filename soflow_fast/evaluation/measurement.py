"""A flow measured at some times of its network calls: on the digits, or against a reference."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import ConfigError
from ..flow import SolutionFlow
from ..sampling import Devices, Drawing
from .digits import about_digits, describe, measure_digits
from .judge import Finish, Judge
from .times_search import Times


class Measurement(NamedTuple):
    """What was found."""

    line: str
    """For people."""
    figures: dict[str, float]
    """By their names in JSON."""


class Measure(Protocol):
    """What measures a flow."""

    distance: str
    """The figure that is best where it is least, as people write it."""

    def at(self, nfe: int, times: Times | None, seed: int) -> Measurement:
        """With `nfe` network calls, at evenly spaced times or others. Raises ValueError for wrong times."""
        ...

    def distance_at(self, times: Times, seed: int) -> float:
        """The distance alone."""
        ...

    def about(self) -> dict[str, Any]:
        """What stands beside the figures as JSON values: the count, the reference."""
        ...


class OfDigits:
    """Digits, which need no reference. several: draw and decode n of them, see `measure_digits`. guidance: as for
    `sample`."""

    distance = "Frechet distance"

    def __init__(
        self,
        flow: SolutionFlow,
        n: int,
        several: Devices[tuple[Drawing, range]],
        guidance: float | None = None,
    ) -> None:
        self._flow, self._n, self._several, self._guidance = flow, n, several, guidance

    def at(self, nfe: int, times: Times | None, seed: int) -> Measurement:
        """See Measure."""
        way: Any = {"several": self._several, "times": times, "guidance": self._guidance}
        scores = measure_digits(self._flow, self._n, nfe, seed, **way)
        return Measurement(shown(times) + describe(nfe, scores, self._n), scores._asdict())

    def distance_at(self, times: Times, seed: int) -> float:
        """See Measure."""
        return self.at(len(times), times, seed).figures["frechet"]

    def about(self) -> dict[str, Any]:
        """See Measure."""
        return {**about_digits(self._n), **of_guidance(self._guidance)}


class AgainstReference:
    """Images that are compared with a reference: labels in turn, so that of each class there are equally many, or
    vectors in turn.

    Args:
        judge: of the metrics.
        n: how many are drawn.
        shape: [C, H, W] of a sample.
        finish_on: gives what makes images, uint8 [n, C, H, W], of samples on a device.
        guidance: as for `sample`.
        vectors: [M, E], of a network that takes some; None: samples have the null one.
    """

    def __init__(
        self,
        flow: SolutionFlow,
        judge: Judge,
        n: int,
        shape: tuple[int, int, int],
        finish_on: Finish,
        guidance: float | None = None,
        vectors: Tensor | None = None,
    ) -> None:
        self._flow, self._judge, self._n, self._shape, self._finish_on = flow, judge, n, shape, finish_on
        self._guidance, self._vectors = guidance, vectors
        distances = [metric for metric in judge.metrics if metric.figure == "frechet"]
        self._metric = distances[0] if distances else None
        self.distance = self._metric.written if self._metric else ""

    def at(self, nfe: int, times: Times | None, seed: int) -> Measurement:
        """See Measure."""
        found = self._judge.of_flow(self._flow, self._drawing(nfe, times, seed), self._finish_on)
        calls = f"{nfe} step{'s' if nfe > 1 else ' '}"
        return Measurement(f"{shown(times)}{calls}: {found.line()}", found.values)

    def distance_at(self, times: Times, seed: int) -> float:
        """See Measure."""
        if self._metric is None:
            raise ConfigError("--metrics: a search for times needs a distance, such as fid, fd-dinov2 or fd-random")
        drawing = self._drawing(len(times), times, seed)
        found = self._judge.of_flow(self._flow, drawing, self._finish_on, only=self._metric)
        return found.values[self._metric.key]

    def about(self) -> dict[str, Any]:
        """See Measure."""
        return {**self._judge.about(self._n), **of_guidance(self._guidance)}

    def _drawing(self, nfe: int, times: Times | None, seed: int) -> Drawing:
        way: Any = {"times": times, "seed": seed, "shape": (self._n, *self._shape), "guidance": self._guidance}
        return Drawing.of(self._flow, labels_in_turn(self._flow, self._n, self._vectors), nfe=nfe, **way)


def labels_in_turn(flow: SolutionFlow, n: int, vectors: Tensor | None = None) -> Tensor | None:
    """0, 1, ... of a flow's classes and again, int64 [n], or the rows of vectors [M, E] and again, [n, E]; None: there
    are neither."""
    if vectors is not None:
        return vectors[torch.arange(n) % len(vectors)]
    classes = getattr(flow.network, "num_classes", 0)
    return torch.arange(n) % classes if classes else None


def of_guidance(guidance: float | None) -> dict[str, float]:
    """A scale as it stands beside figures; None: the network sees none, and nothing stands there."""
    return {} if guidance is None else {"guidance": guidance}


def shown(times: Times | None) -> str:
    """Times as they are written before figures; None: evenly spaced ones, of which nothing is said."""
    return "" if times is None else f"times {','.join(f'{t:g}' for t in times)}: "


def finish_with(to_uint8: Callable[[Tensor], Tensor], decode_on: Callable[[torch.device], Any]) -> Finish:
    """What makes images, uint8 [n, C, H, W], of samples. to_uint8: of images in [-1, 1], to [n, H, W, C].

    decode_on: gives what makes images of latents on a device; None: the samples are images.
    """

    def finish_on(device: torch.device) -> Callable[[Tensor], Tensor]:
        decode = decode_on(device)
        return lambda x: to_uint8(x if decode is None else decode(x)).permute(0, 3, 1, 2)

    return finish_on
