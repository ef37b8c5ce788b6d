"""Sets of images compared with a reference by the features of one network or more."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, DataError, Diverged
from ..flow import SolutionFlow
from ..rng import generator
from ..sampling import Devices, Drawing, draw_on
from .gaussian import Gaussian, GaussianSums, frechet
from .images import Images
from .inception_score import inception_score
from .kernel_distance import kernel_distance
from .metrics import FEW, INCEPTION, OF_INCEPTION, Metric, metrics_of, text
from .neighbours import precision_recall
from .networks import NETWORKS, Extractor, open_networks

MOST_KEPT = 50_000
"""Images of a set whose features are kept, drawn from all: a set that has more would take the memory of the host, and
precision and recall the square of it in time."""
PAIRED = {"kid", "precision", "recall"}
"""Figures of features that are kept one by one."""
STATISTICS = {"frechet": "mu", "spatial": "mu_s"}
"""Figures of Gaussians, and the name of these in an ADM reference."""

Finish = Callable[[torch.device], Callable[[Tensor], Tensor]]
"""Gives, for a device, what makes images, uint8 [n, C, H, W], of samples there."""

Tick = Callable[[int, int], None]


@dataclass(frozen=True)
class Against:
    """What a set was compared with."""

    path: str
    images: int
    """How many it has here; 0: its statistics are all."""
    statistics: bool
    """Whether Gaussians come with it, of images that may be others and more."""
    size: int
    """Height and width of its images, 0: not known."""

    def __str__(self) -> str:
        parts = [f"{self.images} images"] * bool(self.images) + ["its statistics"] * self.statistics
        return f"{self.path} ({' and '.join(parts)})"


@dataclass(frozen=True)
class Figures:
    """The figures of one set of images."""

    metrics: tuple[Metric, ...]
    values: dict[str, float]
    """By `Metric.key`, and with "_std" the deviations that IS and KID have among their parts."""
    images: int
    size: int
    """Height and width of the images."""
    reference: Against

    def line(self) -> str:
        """The figures with their count and reference. A count below 50 000 is said to be small."""
        few = f", fewer than {FEW}," if self.images < FEW else ""
        theirs = self.reference.size
        sizes = f", {self.size} and {theirs} pixels high" if theirs not in (0, self.size) else ""
        return f"{text(self.metrics, self.values)}; of {self.images} images{few} against {self.reference}{sizes}"


class Measured:
    """What is known of a set by one network, added up as its features come. needed: figures that will be asked for."""

    def __init__(self, needed: set[str], count: int) -> None:
        self.needed, self.count = needed, 0
        self._gaussian, self._spatial = GaussianSums(), GaussianSums()
        self._features: list[Tensor] = []
        self._logits: list[Tensor] = []
        self._kept: Tensor | None = None
        if count > MOST_KEPT:
            self._kept = torch.zeros(count, dtype=torch.bool)
            self._kept[torch.randperm(count, generator=generator(0, 0, 0, "kept features"))[:MOST_KEPT]] = True

    def add(self, features: Tensor, spatial: Tensor, logits: Tensor) -> None:
        """The next images."""
        if "frechet" in self.needed:
            self._gaussian.add(features)
        if "spatial" in self.needed:
            self._spatial.add(spatial)
        if "score" in self.needed:
            self._logits.append(logits)
        if PAIRED & self.needed:
            kept = None if self._kept is None else self._kept[self.count : self.count + len(features)]
            self._features.append(features.float() if kept is None else features[kept].float())
        self.count += len(features)

    def gaussian(self, figure: str) -> Gaussian:
        """Of features ("frechet") or spatial features ("spatial"). Raises ValueError for fewer than two images."""
        return (self._gaussian if figure == "frechet" else self._spatial).gaussian()

    def features(self) -> Tensor:
        """Those that were kept, float32 [N, D]."""
        return torch.cat(self._features)

    def logits(self) -> Tensor:
        """[N, K]."""
        return torch.cat(self._logits)


class Judge:
    """Compares sets of images with a reference, which is measured once.

    Args:
        reference: what to compare with; an ADM reference has statistics, which are taken for the Gaussians of
            Inception's features, and images for the other figures.
        metrics: as `metrics_of` gives them.
        extractors: by name, at least those of the metrics.
        devices: take turns with batches.
        threads: whether each device has a thread of its own; without, there is one device, which draws in this thread.
        tick: is told, after each batch, how many images of how many are measured.

    Raises ConfigError for metrics that the reference does not have what is needed for, and DataError.
    """

    def __init__(
        self,
        reference: Images,
        metrics: Sequence[Metric],
        extractors: Mapping[str, Extractor],
        devices: Sequence[torch.device],
        *,
        threads: bool = True,
        tick: Tick = lambda done, total: None,
    ) -> None:
        self.metrics, self._devices, self._threads, self._tick = tuple(metrics), devices, threads, tick
        check_reference(reference, metrics)
        needed = needed_for(metrics)
        self._extractors = {name: extractors[name] for name in needed}
        known = {f for f, name in STATISTICS.items() if name in reference.statistics}
        wanted = {
            name: figures - {"score"} - (known if name == INCEPTION else set()) for name, figures in needed.items()
        }
        wanted = {name: figures for name, figures in wanted.items() if figures}
        self._theirs = self._measured_images(reference, wanted) if wanted else {}
        self._statistics = reference.statistics
        self._where = f"{reference.flag}{reference.path}"
        self.against = Against(reference.path, len(reference), bool(known), reference.size if len(reference) else 0)

    def of_images(self, images: Images) -> Figures:
        """The figures of a set of images. Raises DataError, also for features that are not finite."""
        found = self._measured_images(images, needed_for(self.metrics))
        return self._figures(self.metrics, found, images.size, f"{images.flag}{images.path}")

    def about(self, n: int) -> dict[str, Any]:
        """What stands beside the figures of n images, as JSON values."""
        return {"samples": n, "few": n < FEW, "reference": asdict(self.against)}

    def of_flow(self, flow: SolutionFlow, drawing: Drawing, finish_on: Finish, only: Metric | None = None) -> Figures:
        """The figures of images that are drawn as `drawing` says, each device by a copy of the flow.

        only: one of the metrics. Raises Diverged if the samples are not finite, DataError if their features are not.
        """
        draw_there, size = draw_on(flow, finish_on), 0
        metrics = self.metrics if only is None else (only,)
        needed = needed_for(metrics)

        def work_on(device: torch.device) -> Callable[[tuple[Drawing, range]], tuple[Tensor, ...]]:
            draw, extract = draw_there(device), self._extract_on(device, needed)

            def work(batch: tuple[Drawing, range]) -> tuple[Tensor, ...]:
                finite, images = draw(batch)
                return (finite, torch.tensor(images.shape[-1]), *extract(images))

            return work

        def images(results: Iterable[tuple[Tensor, ...]]) -> Iterator[Sequence[Tensor]]:
            nonlocal size
            for finite, side, *found in results:
                if not finite:
                    raise Diverged(
                        f"samples of {drawing.nfe} network calls are not finite: there is nothing to evaluate"
                    )
                size = int(side)
                yield found

        batches = ((drawing, rows) for rows in drawing.batches())
        with exact_convolutions(), contextlib.ExitStack() as ends:
            if self._threads:
                results = ends.enter_context(Devices(self._devices, work_on)).results(batches)
            else:
                results = map(work_on(self._devices[0]), batches)
            found = self._collected(images(results), needed, drawing.shape[0], "samples")
        return self._figures(metrics, found, size, "samples")

    def _measured_images(self, images: Images, needed: dict[str, set[str]]) -> dict[str, Measured]:
        with exact_convolutions(), Devices(self._devices, lambda device: self._extract_on(device, needed)) as several:
            return self._collected(
                several.results(images.batches()), needed, len(images), f"{images.flag}{images.path}"
            )

    def _extract_on(self, device: torch.device, needed: dict[str, set[str]]) -> Callable[[Tensor], tuple[Tensor, ...]]:
        """What makes, of images uint8 [n, C, H, W], three tensors for each network that is needed."""
        networks = [(self._extractors[name].on(device), figures) for name, figures in needed.items()]

        @torch.no_grad()
        def extract(images: Tensor) -> tuple[Tensor, ...]:
            # Contiguous: convolutions of other layouts round apart, and an image is to have the same features.
            images, found = images.to(device).expand(-1, 3, -1, -1).contiguous(), []
            for network, figures in networks:
                features, spatial, logits = network(images)
                none = features.new_empty(len(features), 0)
                for value, wanted in ((spatial, "spatial"), (logits, "score")):
                    if wanted in figures and value is None:
                        raise ConfigError(f"this network gives nothing that the figure {wanted!r} is made of")
                found += [features, spatial if "spatial" in figures else none, logits if "score" in figures else none]
            return tuple(found)

        return extract

    def _collected(
        self, results: Iterable[Sequence[Tensor]], needed: dict[str, set[str]], count: int, where: str
    ) -> dict[str, Measured]:
        measured = {name: Measured(figures, count) for name, figures in needed.items()}
        for found in results:
            for k, (name, part) in enumerate(measured.items()):
                values = [value.cpu() for value in found[3 * k : 3 * k + 3]]
                if not all(value.isfinite().all() for value in values):
                    raise DataError(f"{where}: features of the network {name} are not finite")
                part.add(*values)
            self._tick(next(iter(measured.values())).count, count)
        return measured

    def _figures(self, metrics: Sequence[Metric], ours: dict[str, Measured], size: int, where: str) -> Figures:
        count = next(iter(ours.values())).count
        values: dict[str, float] = {}
        try:
            for name, mine in ours.items():
                values |= self._of_network([metric for metric in metrics if metric.extractor == name], name, mine)
        except ValueError as error:
            raise DataError(f"{where} and {self._where}: {error}") from None
        return Figures(tuple(metrics), values, count, size, self.against)

    def _of_network(self, metrics: Sequence[Metric], name: str, mine: Measured) -> dict[str, float]:
        """The figures of one network. Raises ValueError for what cannot be compared."""
        theirs, device = self._theirs.get(name), self._devices[0]
        values: dict[str, float] = {}
        pair: dict[str, float] = {}
        for metric in metrics:
            if metric.figure in STATISTICS:
                known = self._statistics.get(STATISTICS[metric.figure]) if name == INCEPTION else None
                other = known or (theirs.gaussian(metric.figure) if theirs else None)
                assert other is not None
                values[metric.key] = frechet(mine.gaussian(metric.figure), other)
            elif metric.figure == "score":
                values[metric.key], values[f"{metric.key}_std"] = inception_score(mine.logits())
            else:
                assert theirs is not None
                if metric.figure == "kid":
                    found = kernel_distance(mine.features(), theirs.features(), device=device)
                    values[metric.key] = found.mean
                    if found.deviation is not None:
                        values[f"{metric.key}_std"] = found.deviation
                    continue
                pair = pair or precision_recall(mine.features(), theirs.features(), device=device)._asdict()
                values[metric.key] = pair[metric.figure]
        return values


def judge_for(
    reference: Images,
    names: str,
    devices: Sequence[torch.device],
    *,
    inception: str = "",
    dinov2: str = "",
    threads: bool = True,
    tick: Tick = lambda done, total: None,
) -> Judge:
    """The judge of metrics by name, with commas between them.

    names: "": all of Inception that the reference has what is needed for, and FD-DINOv2 where `dinov2` is given.
    inception, dinov2: as `open_networks` takes them. threads, tick: as `Judge` does.

    Raises ConfigError and DataError.
    """
    if names:
        try:
            metrics = metrics_of(names.split(","), NETWORKS)
        except ValueError as error:
            raise ConfigError(f"--metrics {names}: {error}") from None
        check_reference(reference, metrics)  # before networks are loaded
    else:
        known = metrics_of([*OF_INCEPTION, *["fd-dinov2"] * bool(dinov2)], NETWORKS)
        metrics = [metric for metric in known if not missing(reference, metric)]
    networks = open_networks(dict.fromkeys(metric.extractor for metric in metrics), inception=inception, dinov2=dinov2)
    return Judge(reference, metrics, networks, devices, threads=threads, tick=tick)


def needed_for(metrics: Iterable[Metric]) -> dict[str, set[str]]:
    """The figures of some metrics, by network."""
    needed: dict[str, set[str]] = {}
    for metric in metrics:
        needed.setdefault(metric.extractor, set()).add(metric.figure)
    return needed


def check_reference(reference: Images, metrics: Iterable[Metric]) -> None:
    """Raise ConfigError for a metric that a reference does not have what is needed for."""
    for metric in metrics:
        if lacking := missing(reference, metric):
            raise ConfigError(f"{reference.flag}{reference.path}: {lacking}, which {metric.written} needs")


def missing(reference: Images, metric: Metric) -> str:
    """What a reference lacks for a metric, in words; "": nothing."""
    if len(reference) or metric.figure == "score":
        return ""
    if metric.extractor == INCEPTION and metric.figure in STATISTICS:
        name = STATISTICS[metric.figure]
        return "" if name in reference.statistics else f"holds neither images nor {name}"
    return "holds statistics and no images"


@contextlib.contextmanager
def exact_convolutions() -> Iterator[None]:
    """Convolutions in float32 inside, and not in TF32, which torch lets them have on GPUs of the last years."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
