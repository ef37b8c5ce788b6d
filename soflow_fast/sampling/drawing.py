"""Drawing images: n network calls, by default each from the current time straight to the data (arXiv 2512.15657)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.schema import SamplingMethod
from ..flow import SolutionFlow
from ..rng import generator
from .devices import copied, uploaded
from .guidance import chosen_guidance
from .solving import checked_method, checked_times, noise_count, solve, usual_calls, whole

BATCH = 64
"""Images per network call when noise is drawn from a seed."""


@torch.no_grad()
def sample(
    flow: SolutionFlow,
    y: Tensor | Sequence | None = None,
    *,
    nfe: int | None = None,
    times: Sequence[float] | None = None,
    method: SamplingMethod | None = None,
    noise: Sequence[Tensor] | Tensor | None = None,
    seed: int | None = None,
    shape: Sequence[int] | None = None,
    batch_size: int = BATCH,
    guidance: float | None = None,
) -> Tensor:
    """Images [B, C, H, W] in the scale of the training data, from `nfe` network calls each.

    At times 1 = t_0 > ... > t_nfe = 0: solve from t_k to 0, re-noise the result to t_{k+1}, and so on.

    Args:
        flow: the trained flow; runs on the device and in the dtype of its parameters.
        y: labels [B], or vectors [B, E] of a network with a `condition_size`; None: the null label or vector.
        nfe: number of function evaluations, at least 1; None: as many as `times` has, or 1, of "euler" 10.
        times: t_0 = 1, t_1, ..., falling, one for each network call; None: evenly spaced.
        method: "renoise", as above; "consecutive": solve from t_k to t_{k+1}; "euler": go there along the velocity;
            None: "renoise", of a flow that was trained by flow matching "euler", which is then the only one.
        noise: standard normal noise [B, C, H, W], one for each network call of "renoise" and else one; nothing else is
            random.
        seed: instead of `noise`: image i has noise of its own, a function of (seed, i, call) drawn on the CPU.
            The network runs on exactly `batch_size` images at a time (the last batch is filled up), so that image i is
            the same to the bit however many others are drawn with it.
        shape: with `seed`: [B, C, H, W]; may be left out where the network has a `config` and y is given.
        guidance: of a network with a `guidance_range`: the scale w, at no further calls; None: the geometric mean of
            the range. Samples without a label have none.

    Raises:
        ValueError: for nfe < 1, noise and seed both or neither given, times, shapes, labels or vectors that do not
            fit, for a method that is none or not the flow's, and for a guidance that the network was not trained for.
    """
    if (noise is None) == (seed is None):
        raise ValueError("give either noise, one tensor per network call, or a seed")
    if noise is None:
        drawing = Drawing.of(
            flow,
            y,
            nfe=nfe,
            times=times,
            method=method,
            seed=0 if seed is None else seed,
            shape=shape,
            batch_size=batch_size,
            guidance=guidance,
        )
        batches = [drawing.batch(flow, rows)[: len(rows)] for rows in drawing.batches()]
        return torch.cat(batches) if batches else next(flow.parameters()).new_empty(drawing.shape)
    times, method = checked_times(nfe, times, usual_calls(flow, method)), checked_method(method, flow)
    labels, parameter, wanted = _checked(flow, y), next(flow.parameters()), noise_count(times, method)
    if len(noise) != wanted:
        each = "one tensor per network call" if method == "renoise" else f"one tensor for method {method}"
        raise ValueError(f"noise must hold {each}: {wanted}, got {len(noise)}")
    if any(n.shape != noise[0].shape for n in noise):
        raise ValueError(f"noise must be of one shape, got {[list(n.shape) for n in noise]}")
    labels = None if labels is None else labels.to(parameter.device)
    return solve(flow, lambda k: noise[k].to(parameter), times, method, labels, chosen_guidance(flow, guidance))


def sample_batches(
    flow: SolutionFlow,
    y: Tensor | Sequence | None = None,
    *,
    nfe: int | None = None,
    times: Sequence[float] | None = None,
    method: SamplingMethod | None = None,
    seed: int = 0,
    shape: Sequence[int] | None = None,
    batch_size: int = BATCH,
    guidance: float | None = None,
) -> Iterator[Tensor]:
    """The images of `sample` from a seed, in batches [at most `batch_size`, C, H, W], each drawn when it is asked for.

    Raises ValueError as `sample` does, before the first batch.
    """
    settings = {"seed": seed, "shape": shape, "batch_size": batch_size, "guidance": guidance}
    drawing = Drawing.of(flow, y, nfe=nfe, times=times, method=method, **settings)
    return (drawing.batch(flow, rows)[: len(rows)] for rows in drawing.batches())


@dataclass(frozen=True)
class Drawing:
    """Images that are drawn from a seed. Each is a function of the seed, its condition and its number alone: whoever
    draws it does so in the same batch, and all batches are of one size."""

    shape: tuple[int, ...]
    """[n, C, H, W] of all images."""
    labels: Tensor | None
    """int64 [n], or vectors [n, E]; None: the null one."""
    times: tuple[float, ...]
    """Those of the network calls, falling from 1; time 0 comes after the last."""
    method: SamplingMethod
    seed: int
    batch_size: int
    guidance: float | None = None
    """The scale w for a network that sees it; None: for one that does not."""

    @classmethod
    def of(
        cls,
        flow: SolutionFlow,
        y: Tensor | Sequence | None = None,
        *,
        nfe: int | None = None,
        times: Sequence[float] | None = None,
        method: SamplingMethod | None = None,
        seed: int = 0,
        shape: Sequence[int] | None = None,
        batch_size: int = BATCH,
        guidance: float | None = None,
    ) -> "Drawing":
        """The arguments of `sample`, checked. Raises ValueError."""
        times, method = checked_times(nfe, times, usual_calls(flow, method)), checked_method(method, flow)
        labels = _checked(flow, y)
        seed, batch_size = whole("seed", seed, 0), whole("batch_size", batch_size, 1)
        shape = tuple(whole("shape", n, 0) for n in _shape(flow, labels, shape))
        if labels is not None and len(labels) != shape[0]:
            what = "labels" if labels.dim() == 1 else "vectors"
            raise ValueError(f"y must hold {shape[0]} {what}, got {len(labels)}")
        return cls(shape, labels, times, method, seed, batch_size, chosen_guidance(flow, guidance))

    @property
    def nfe(self) -> int:
        """Network calls of each image."""
        return len(self.times)

    def batches(self) -> Iterator[range]:
        """The numbers of the images of each batch."""
        for first in range(0, self.shape[0], self.batch_size):
            yield range(first, min(first + self.batch_size, self.shape[0]))

    @torch.no_grad()
    def batch(self, flow: SolutionFlow, rows: range) -> Tensor:
        """A batch of `batches`, [batch_size, C, H, W] on the device of a flow: the last image fills up a short one."""
        parameter = next(flow.parameters())
        filled = torch.arange(self.batch_size).clamp(max=len(rows) - 1)

        def noise(k: int) -> Tensor:
            drawn = torch.stack([image_noise(self.seed, i, k, self.shape[1:]) for i in rows])
            return uploaded(drawn[filled].to(parameter.dtype), parameter.device)

        own = None if self.labels is None else self.labels[rows.start : rows.stop]
        labels = None if own is None else uploaded(own[filled], parameter.device)
        return solve(flow, noise, self.times, self.method, labels, self.guidance)


Finish = Callable[[Tensor], Tensor | tuple[Tensor, ...]]
"""What makes images of samples, or several forms of them."""


def draw_on(
    flow: SolutionFlow, finish_on: Callable[[torch.device], Finish | None] = lambda device: None
) -> Callable[[torch.device], Callable[[tuple[Drawing, range]], tuple[Tensor, ...]]]:
    """What `Devices` need to draw batches of a `Drawing`, each device by a copy of the flow.

    A batch is (drawing, rows) with rows of `drawing.batches()`. It becomes a bool [], whether the samples are finite,
    and the images, or each form of them. finish_on: gives what makes images of samples on a device, None: the samples
    are what is wanted.
    """

    def work_on(device: torch.device) -> Callable[[tuple[Drawing, range]], tuple[Tensor, ...]]:
        own, finish = copied(flow, device), finish_on(device)

        def draw(batch: tuple[Drawing, range]) -> tuple[Tensor, ...]:
            drawing, rows = batch
            x = drawing.batch(own, rows)[: len(rows)]
            made = x if finish is None else finish(x)
            return torch.isfinite(x).all(), *(made if isinstance(made, tuple) else (made,))

        return draw

    return work_on


def image_noise(seed: int, index: int, call: int, shape: Sequence[int]) -> Tensor:
    """Noise [C, H, W] for image `index` at network call `call` of a seed, float32 on the CPU."""
    return torch.randn(tuple(shape), generator=generator(seed, index, call, "sample noise"))


def _checked(flow: SolutionFlow, y: Tensor | Sequence | None) -> Tensor | None:
    """The labels as int64 or the vectors as float32, wherever they are. Raises ValueError."""
    if y is None and not has_null_label(flow):
        raise ValueError("y must be given: the network was trained with a label each, it has no null label")
    return None if y is None else checked_conditions(flow, torch.as_tensor(y))


def has_null_label(flow: SolutionFlow) -> bool:
    """Whether a network can be asked for samples without a label."""
    return getattr(getattr(flow.network, "config", None), "null_label", True)


def condition_size(flow: SolutionFlow) -> int:
    """The size of the vectors that a network takes; 0: it takes labels."""
    return getattr(getattr(flow.network, "config", None), "condition_size", 0)


def checked_conditions(flow: SolutionFlow, y: Tensor) -> Tensor:
    """Labels [B] as int64, or vectors [B, E] in the dtype of the flow. Raises ValueError for those that the network
    does not take, and for vectors that are not finite."""
    size = condition_size(flow)
    if not size:
        return _checked_labels(flow, y)
    if not y.is_floating_point() or y.dim() != 2 or y.shape[1] != size:
        raise ValueError(f"y must be vectors [B, {size}], floating, got {y.dtype} {list(y.shape)}")
    wrong = (~torch.isfinite(y)).any(1).nonzero()
    if len(wrong):
        raise ValueError(f"y must be finite, row {int(wrong[0])} of it is not")
    return y.to(next(flow.parameters()).dtype)


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


def _shape(flow: SolutionFlow, labels: Tensor | Sequence | None, shape: Sequence[int] | None) -> Sequence[int]:
    """The shape [B, C, H, W] of all images. Raises ValueError if it is neither given nor known from the network."""
    if shape is not None:
        return shape
    config = getattr(flow.network, "config", None)
    if config is None or labels is None:
        raise ValueError("a seed needs a shape [B, C, H, W], or labels and a network with a config")
    return [len(labels), *config.sample_shape]
