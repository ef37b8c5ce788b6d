"""Drawing images: n network calls, each from the current time straight to the data (arXiv 2512.15657).

`sample` draws any number of images; `OneStep` is the single network call for the least latency.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .errors import ConfigError
from .flow import SolutionFlow
from .rng import generator

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

    Raises:
        ValueError: for nfe < 1, noise and seed both or neither given, shapes or labels that do not fit.
    """
    if (noise is None) == (seed is None):
        raise ValueError("give either noise, one tensor per network call, or a seed")
    if noise is None:
        batches = list(sample_batches(flow, y, nfe=nfe, seed=int(seed or 0), shape=shape, batch_size=batch_size))
        return torch.cat(batches) if batches else next(flow.parameters()).new_empty(_shape(flow, y, shape))
    parameter, labels = _checked(flow, y, nfe)
    if len(noise) != nfe:
        raise ValueError(f"noise must hold one tensor per network call: {nfe}, got {len(noise)}")
    if any(n.shape != noise[0].shape for n in noise):
        raise ValueError(f"noise must be of one shape, got {[list(n.shape) for n in noise]}")
    return _solve(flow, lambda k: noise[k].to(parameter), nfe, labels)


def sample_batches(
    flow: SolutionFlow,
    y: Tensor | Sequence[int] | None = None,
    *,
    nfe: int = 1,
    seed: int = 0,
    shape: Sequence[int] | None = None,
    batch_size: int = BATCH,
) -> Iterator[Tensor]:
    """The images of `sample` from a seed, in batches [at most `batch_size`, C, H, W], each drawn when it is asked for.

    Raises ValueError as `sample` does, before the first batch.
    """
    parameter, labels = _checked(flow, y, nfe)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    count, *image = _shape(flow, labels, shape)
    if labels is not None and len(labels) != count:
        raise ValueError(f"y must hold {count} labels, got {len(labels)}")

    @torch.no_grad()
    def batch(first: int) -> Tensor:
        last = min(first + batch_size, count)
        index = [min(i, last - 1) for i in range(first, first + batch_size)]

        def noise(k: int) -> Tensor:
            return torch.stack([image_noise(seed, i, k, image) for i in index]).to(parameter)

        return _solve(flow, noise, nfe, None if labels is None else labels[index])[: last - first]

    return map(batch, range(0, count, batch_size))


def image_noise(seed: int, index: int, call: int, shape: Sequence[int]) -> Tensor:
    """Noise [C, H, W] for image `index` at network call `call` of a seed, float32 on the CPU."""
    return torch.randn(tuple(shape), generator=generator(seed, index, call, "sample noise"))


def _solve(flow: SolutionFlow, noise: Callable[[int], Tensor], nfe: int, labels: Tensor | None) -> Tensor:
    """Images from `nfe` network calls; `noise(k)` is the noise of call k."""
    x = noise(0)
    for k in range(nfe):
        t, after = (torch.full((len(x),), 1 - i / nfe, device=x.device, dtype=x.dtype) for i in (k, k + 1))
        x = flow.solution(x, t, torch.zeros_like(t), labels)
        if k + 1 < nfe:
            x = flow.point(x, noise(k + 1), after)[0]
    return x


def _checked(flow: SolutionFlow, y: Tensor | Sequence[int] | None, nfe: int) -> tuple[Tensor, Tensor | None]:
    """A parameter of the flow, which has its device and dtype, and the labels on that device. Raises ValueError."""
    if nfe < 1:
        raise ValueError(f"nfe must be at least 1, got {nfe}")
    parameter = next(flow.parameters())
    return parameter, None if y is None else _checked_labels(flow, torch.as_tensor(y, device=parameter.device))


def _checked_labels(flow: SolutionFlow, labels: Tensor) -> Tensor:
    """Labels [B] as int64. Raises ValueError for others than the network's classes and its null label."""
    whole = labels.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64) or not labels.numel()
    if labels.dim() != 1 or not whole:
        raise ValueError(f"y must be [B] whole numbers, got {labels.dtype} {list(labels.shape)}")
    classes = getattr(flow.network, "num_classes", None)
    if classes is not None and labels.numel() and (labels.min() < 0 or labels.max() > classes):
        known = f"in 0..{classes - 1} ({classes}: the null label)" if classes else "0 or left out: there are no classes"
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


class OneStep:
    """x_0 = f(x_1, 1, 0; y) in one network call (arXiv 2512.15657): `images = OneStep(flow)(noise, labels)`.

    The flow is taken over: the parameters of its blocks are rounded to bf16, or its blocks compiled, where these are
    asked for, and it is not to be trained meanwhile.

    Args:
        flow: a trained flow on its device, in float32.
        precision: "auto" (bf16 on a GPU that has it, else fp32), "bf16", "tf32" or "fp32".
        compile: the blocks by torch.compile; the first call of each size of batch takes its time.
        cuda_graph: record the call and replay it; calls of another size than the first run as they are.

    Raises ConfigError for what the device lacks.
    """

    def __init__(
        self, flow: SolutionFlow, *, precision: str = "auto", compile: bool = False, cuda_graph: bool = False
    ) -> None:
        from .training.cuda_graph import GraphedFunction  # here, as plain sampling needs nothing of training
        from .training.precision import resolve_precision, round_parameters

        self.flow = flow.requires_grad_(False).eval()
        self.device = next(flow.parameters()).device
        self.precision = resolve_precision(precision, self.device)
        if self.precision == "fp8":
            raise ConfigError("precision fp8: OneStep has bf16, tf32 and fp32")
        if cuda_graph and self.device.type != "cuda":
            raise ConfigError(f"cuda_graph: needs a GPU, the device is {self.device.type}")
        if self.precision == "bf16":
            round_parameters(flow.network, flow.network.low_precision_layers(), torch.bfloat16)
        if compile:
            flow.network.compile_blocks()
        self.call = GraphedFunction(self._call) if cuda_graph else self._call

    @torch.no_grad()
    def __call__(self, noise: Tensor, y: Tensor | None = None) -> Tensor:
        """Images [B, C, H, W] in the scale of the training data, from standard normal noise [B, C, H, W] and labels
        [B] (None: the null label) on the flow's device."""
        return self.call(noise, y)

    def _call(self, noise: Tensor, y: Tensor | None) -> Tensor:
        from .training.precision import matmul_precision

        t = torch.ones(len(noise), device=noise.device, dtype=noise.dtype)
        with matmul_precision(self.precision, self.device):
            return self.flow.solution(noise, t, torch.zeros_like(t), y)
