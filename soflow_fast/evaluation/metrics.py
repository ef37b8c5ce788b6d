"""The names of the figures: which one each is, of which network, and how it is written."""

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from ..config.schema import nearest

INCEPTION = "inception"
OF_INCEPTION = {
    "fid": "frechet",
    "sfid": "spatial",
    "is": "score",
    "precision": "precision",
    "recall": "recall",
    "kid": "kid",
}
"""The names that the field has, of features of Inception, and the figures that they are."""
OF_OTHERS = {"fd": "frechet", "precision": "precision", "recall": "recall", "kid": "kid"}
"""Before "-NAME", of features of the network of that name."""
WRITTEN = {"fid": "FID", "sfid": "sFID", "is": "IS", "kid": "KID", "fd-dinov2": "FD-DINOv2"}
PLACES = {"frechet": 2, "spatial": 2, "score": 2, "precision": 4, "recall": 4, "kid": 5}
"""Digits after the point."""
FEW = 50_000
"""Images that published figures are of. A Frechet distance of fewer is larger, as the covariances are less known."""


class Metric(NamedTuple):
    """A figure of the features of one network."""

    name: str
    figure: str
    extractor: str

    @property
    def written(self) -> str:
        """As people write it."""
        return WRITTEN.get(self.name, self.name.replace("fd-", "FD-"))

    @property
    def key(self) -> str:
        """As it is called in JSON, where "KEY_std" is beside it for the figures that have a deviation."""
        return self.name.replace("-", "_")


def metrics_of(names: Iterable[str], extractors: Collection[str]) -> list[Metric]:
    """The metrics of some names, each once. extractors: networks that there are. Raises ValueError for another name."""
    known = {name: Metric(name, figure, INCEPTION) for name, figure in OF_INCEPTION.items()}
    for extractor in extractors:
        if extractor != INCEPTION:
            of_it = {f"{name}-{extractor}": figure for name, figure in OF_OTHERS.items()}
            known |= {name: Metric(name, figure, extractor) for name, figure in of_it.items()}
    names = list(dict.fromkeys(name.strip().lower() for name in names))
    for name in names:
        if name not in known:
            raise ValueError(f"{name!r} is none of {', '.join(known)}{nearest(name, known)}")
    return [known[name] for name in names]


def text(metrics: Iterable[Metric], values: Mapping[str, float]) -> str:
    """The figures in one line, "FID 2.34, IS 250.10 ± 3.20"."""
    parts = []
    for metric in metrics:
        places, deviation = PLACES[metric.figure], values.get(f"{metric.key}_std")
        more = "" if deviation is None else f" ± {deviation:.{places}f}"
        value = round(values[metric.key], places) + 0.0  # and not -0.00
        parts.append(f"{metric.written} {value:.{places}f}{more}")
    return ", ".join(parts)
