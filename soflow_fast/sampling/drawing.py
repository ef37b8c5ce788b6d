"""Drawing images: n network calls, each from the current time straight to the data (arXiv 2512.15657)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..flow import SolutionFlow
from ..rng import generator
from .devices import copied, uploaded
from .guidance import chosen_guidance, scales

BATCH = 64
"""Images per network call when noise is drawn from a seed."""


@torch.no_grad()
def sample(
    flow: SolutionFlow,
    y: Tensor | Sequence[int] | None = None,
    *,
    nfe: int = 1,
    noise: Sequence[Tensor] | Tensor | None = None,
    seed: int | None = None,
    shape: Sequence[int] | None = None,
    batch_size: int = BATCH,
    guidance: float | None = None,
) -> Tensor:
    """Images [B, C, H, W] in the scale of the training data, from `nfe` network calls each.

    At times 1 = t_0 > ... > t_nfe = 0, evenly spaced: solve from t_k to 0, re-noise the result to t_{k+1}, and so on.

    Args:
        flow: the trained flow; runs on the device and in the dtype of its parameters.
        y: labels [B]; None: the null label.
        nfe: number of function evaluations, at least 1.
        noise: standard normal noise, one [B, C, H, W] per network call; nothing else is random.
        seed: instead of `noise`: image i has noise of its own, a function of (seed, i, call) drawn on the CPU.
            The network runs on exactly `batch_size` images at a time (the last batch is filled up), so that image i is
            the same to the bit however many others are drawn with it.
        shape: with `seed`: [B, C, H, W]; may be left out where the network has a `config` and y is given.
        guidance: of a network with a `guidance_range`: the scale w, at no further calls; None: the geometric mean of
            the range. Samples without a label have none.

    Raises:
        ValueError: for nfe < 1, noise and seed both or neither given, shapes or labels that do not fit, a guidance that
            the network was not trained for.
    """
    if (noise is None) == (seed is None):
        raise ValueError("give either noise, one tensor per network call, or a seed")
    if noise is None:
        settings = {"seed": int(seed or 0), "shape": shape, "batch_size": batch_size, "guidance": guidance}
        batches = list(sample_batches(flow, y, nfe=nfe, **settings))
        return torch.cat(batches) if batches else next(flow.parameters()).new_empty(_shape(flow, y, shape))
    labels, parameter = _checked(flow, y, nfe), next(flow.parameters())
    if len(noise) != nfe:
        raise ValueError(f"noise must hold one tensor per network call: {nfe}, got {len(noise)}")
    if any(n.shape != noise[0].shape for n in noise):
        raise ValueError(f"noise must be of one shape, got {[list(n.shape) for n in noise]}")
    labels = None if labels is None else labels.to(parameter.device)
    return _solve(flow, lambda k: noise[k].to(parameter), nfe, labels, chosen_guidance(flow, guidance))


def sample_batches(
    flow: SolutionFlow,
    y: Tensor | Sequence[int] | None = None,
    *,
    nfe: int = 1,
    seed: int = 0,
    shape: Sequence[int] | None = None,
    batch_size: int = BATCH,
    guidance: float | None = None,
) -> Iterator[Tensor]:
    """The images of `sample` from a seed, in batches [at most `batch_size`, C, H, W], each drawn when it is asked for.

    Raises ValueError as `sample` does, before the first batch.
    """
    drawing = Drawing.of(flow, y, nfe=nfe, seed=seed, shape=shape, batch_size=batch_size, guidance=guidance)
    return (drawing.batch(flow, rows)[: len(rows)] for rows in drawing.batches())


@dataclass(frozen=True)
class Drawing:
    """Images that are drawn from a seed. Each is a function of the seed, its label and its number alone: whoever draws
    it does so in the same batch, and all batches are of one size."""

    shape: tuple[int, ...]
    """[n, C, H, W] of all images."""
    labels: Tensor | None
    """int64 [n]; None: the null label."""
    nfe: int
    seed: int
    batch_size: int
    guidance: float | None = None
    """The scale w for a network that sees it; None: for one that does not."""

    @classmethod
    def of(
        cls,
        flow: SolutionFlow,
        y: Tensor | Sequence[int] | None = None,
        *,
        nfe: int = 1,
        seed: int = 0,
        shape: Sequence[int] | None = None,
        batch_size: int = BATCH,
        guidance: float | None = None,
    ) -> "Drawing":
        """The arguments of `sample`, checked. Raises ValueError."""
        labels = _checked(flow, y, nfe)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        shape = tuple(_shape(flow, labels, shape))
        if labels is not None and len(labels) != shape[0]:
            raise ValueError(f"y must hold {shape[0]} labels, got {len(labels)}")
        return cls(shape, labels, nfe, seed, batch_size, chosen_guidance(flow, guidance))

    def batches(self) -> Iterator[range]:
        """The numbers of the images of each batch."""
        for first in range(0, self.shape[0], self.batch_size):
            yield range(first, min(first + self.batch_size, self.shape[0]))

    @torch.no_grad()
    def batch(self, flow: SolutionFlow, rows: range) -> Tensor:
        """A batch of `batches`, [batch_size, C, H, W] on the device of a flow: the last image fills up a short one."""
        parameter = next(flow.parameters())
        index = [min(i, rows[-1]) for i in range(rows.start, rows.start + self.batch_size)]

        def noise(k: int) -> Tensor:
            drawn = torch.stack([image_noise(self.seed, i, k, self.shape[1:]) for i in index])
            return uploaded(drawn.to(parameter.dtype), parameter.device)

        labels = None if self.labels is None else uploaded(self.labels[index], parameter.device)
        return _solve(flow, noise, self.nfe, labels, self.guidance)


Finish = Callable[[Tensor], Tensor]
"""What makes images of samples."""


def draw_on(
    flow: SolutionFlow, finish_on: Callable[[torch.device], Finish | None] = lambda device: None
) -> Callable[[torch.device], Callable[[tuple[Drawing, range]], tuple[Tensor, Tensor]]]:
    """What `Devices` need to draw batches of a `Drawing`, each device by a copy of the flow.

    A batch is (drawing, rows) with rows of `drawing.batches()`. It becomes a bool [], whether the samples are finite,
    and the images. finish_on: gives what makes images of samples on a device, None: the samples are what is wanted.
    """

    def work_on(device: torch.device) -> Callable[[tuple[Drawing, range]], tuple[Tensor, Tensor]]:
        own, finish = copied(flow, device), finish_on(device)

        def draw(batch: tuple[Drawing, range]) -> tuple[Tensor, Tensor]:
            drawing, rows = batch
            x = drawing.batch(own, rows)[: len(rows)]
            return torch.isfinite(x).all(), x if finish is None else finish(x)

        return draw

    return work_on


def image_noise(seed: int, index: int, call: int, shape: Sequence[int]) -> Tensor:
    """Noise [C, H, W] for image `index` at network call `call` of a seed, float32 on the CPU."""
    return torch.randn(tuple(shape), generator=generator(seed, index, call, "sample noise"))


def _solve(
    flow: SolutionFlow, noise: Callable[[int], Tensor], nfe: int, labels: Tensor | None, guidance: float | None
) -> Tensor:
    """Images from `nfe` network calls; `noise(k)` is the noise of call k."""
    x = noise(0)
    w = scales(flow, guidance, labels, x)
    for k in range(nfe):
        t, after = (torch.full((len(x),), 1 - i / nfe, device=x.device, dtype=x.dtype) for i in (k, k + 1))
        x = flow.solution(x, t, torch.zeros_like(t), labels, w)
        if k + 1 < nfe:
            x = flow.point(x, noise(k + 1), after)[0]
    return x


def _checked(flow: SolutionFlow, y: Tensor | Sequence[int] | None, nfe: int) -> Tensor | None:
    """The labels as int64, wherever they are. Raises ValueError."""
    if nfe < 1:
        raise ValueError(f"nfe must be at least 1, got {nfe}")
    if y is None and not has_null_label(flow):
        raise ValueError("y must be given: the network was trained with a label each, it has no null label")
    return None if y is None else _checked_labels(flow, torch.as_tensor(y))


def has_null_label(flow: SolutionFlow) -> bool:
    """Whether a network can be asked for samples without a label."""
    return getattr(getattr(flow.network, "config", None), "null_label", True)


def _checked_labels(flow: SolutionFlow, labels: Tensor) -> Tensor:
    """Labels [B] as int64. Raises ValueError for others than the network's classes and its null label."""
    whole = labels.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64) or not labels.numel()
    if labels.dim() != 1 or not whole:
        raise ValueError(f"y must be [B] whole numbers, got {labels.dtype} {list(labels.shape)}")
    classes = getattr(flow.network, "num_classes", None)
    most = (classes or 0) - (not has_null_label(flow))
    if classes is not None and labels.numel() and (labels.min() < 0 or labels.max() > most):
        null = f"{classes}: the null label" if most == classes else "there is no null label"
        known = f"in 0..{classes - 1} ({null})" if classes else "0 or left out: there are no classes"
        raise ValueError(f"y must be {known}, got {int(labels.min())} to {int(labels.max())}")
    return labels.long()


def _shape(flow: SolutionFlow, labels: Tensor | Sequence[int] | None, shape: Sequence[int] | None) -> Sequence[int]:
    """The shape [B, C, H, W] of all images. Raises ValueError if it is neither given nor known from the network."""
    if shape is not None:
        return shape
    config = getattr(flow.network, "config", None)
    if config is None or labels is None:
        raise ValueError("a seed needs a shape [B, C, H, W], or labels and a network with a config")
    return [len(labels), config.in_channels, config.input_size, config.input_size]
