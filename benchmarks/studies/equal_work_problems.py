"""The two problems of `benchmarks.studies.equal_work`: digits, and photographs of 32 x 32 pixels; their judges."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from soflow_fast.config.presets import preset
from soflow_fast.config.schema import Config
from soflow_fast.data import Dataset, Source, open_source
from soflow_fast.errors import Diverged, UserError
from soflow_fast.evaluation import Gaussian, RandomFeatures, frechet, labels_in_turn, measure_digits
from soflow_fast.flow import SolutionFlow
from soflow_fast.runs.images import to_uint8
from soflow_fast.sampling import sample

DIGIT_SAMPLES = 4000
PHOTOGRAPHS = 1000
"""Samples that are judged."""
REFERENCE = 10_000
"""Real photographs that samples are compared with."""
BLOCK = 4
"""Pixels, in height and in width, of which the distance in pixel space takes the mean."""

RATES = (2e-3, 4e-3, 8e-3)


class Problem(NamedTuple):
    """Data, a network, the settings that all methods share, and a judge."""

    configure: Callable[[int, int, float, str], Config]
    """(seed, steps, learning rate, path of the data)."""
    open: Callable[[Config], Source]
    rates: tuple[float, ...]
    """Learning rates that are tried for each method."""
    judge: Callable[[SolutionFlow, int, str], dict[str, float]]
    """(flow, network calls, path of the data) -> figures of its samples."""
    figure: str
    """The figure that chooses a learning rate; lower is better."""


def digits(seed: int, steps: int, rate: float, path: str) -> Config:
    """The digits preset, which was tuned for SoFlow, without what the engine measures on the way."""
    changes = {"run.check_quotient_every": 0, "optim.lr": rate}
    return preset("digits", seed=seed, steps=steps, precision="fp32", device="cpu", **changes)


def photographs(seed: int, steps: int, rate: float, path: str) -> Config:
    """A small DiT of 64 tokens; times, weights and r are SoFlow's public recipe. Without guidance: a guided sample is
    not meant to be distributed as the data, and the distance would count that."""
    changes = {
        "data.path": path,
        "model.patch_size": 4,
        "model.hidden_size": 96,
        "model.depth": 4,
        "model.num_heads": 4,
        "objective.guidance_scale": 1.0,
        "objective.label_drop": 0.0,
        "optim.lr": rate,
        "optim.warmup_steps": min(50, steps // 10),
        "run.check_quotient_every": 0,
    }
    return preset("cifar10", seed=seed, steps=steps, batch_size=32, precision="fp32", device="cpu", **changes)


def judge_digits(flow: SolutionFlow, nfe: int, path: str) -> dict[str, float]:
    """The share classified as their label, Frechet distance in pixel space, share of near copies. Raises Diverged."""
    return measure_digits(flow, DIGIT_SAMPLES, nfe, seed=0)._asdict()


def judge_photographs(flow: SolutionFlow, nfe: int, path: str) -> dict[str, float]:
    """Frechet distances from the real photographs, of samples of all classes in turn. Raises Diverged."""
    made = sample(flow, labels_in_turn(flow, PHOTOGRAPHS), nfe=nfe, seed=0)
    if not made.isfinite().all():
        raise Diverged(f"samples of {nfe} network calls are not finite")
    return distances(to_uint8(made).permute(0, 3, 1, 2), path)


def open_photographs(config: Config) -> Source:
    """The batches of a run of a configuration."""
    data = config.data
    return Source(_dataset(data.path), seed=config.seed, batch_size=config.batch_size, flip=data.flip, place=data.path)


@functools.lru_cache(maxsize=1)
def _dataset(path: str) -> Dataset:
    """The photographs, opened once by a process: to look through all of them takes seconds."""
    return open_source(photographs(0, 1, 1e-3, path)).dataset


@functools.lru_cache(maxsize=1)
def _real(path: str) -> tuple[Gaussian, Gaussian, Tensor]:
    """Gaussians of REFERENCE real photographs by both features, and PHOTOGRAPHS others, uint8 [n, 3, 32, 32]."""
    dataset = _dataset(path)
    if len(dataset) < REFERENCE + PHOTOGRAPHS:
        wanted = f"{REFERENCE + PHOTOGRAPHS} photographs at least are needed, to judge by"
        raise UserError(f"--data {path}: {wanted}; it has {len(dataset)}")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    reference, others = order[:REFERENCE], order[REFERENCE : REFERENCE + PHOTOGRAPHS]
    real = dataset.read(reference)
    return Gaussian.of(convolved(real)), Gaussian.of(coarse(real)), dataset.read(others)


def convolved(images: Tensor) -> Tensor:
    """Random features [n, 224] of images uint8 [n, 3, 32, 32]."""
    extract = RandomFeatures().on(images.device)
    with torch.no_grad():
        return torch.cat([extract(part).features for part in images.split(500)])


def coarse(images: Tensor) -> Tensor:
    """Pixels in [-1, 1] of images uint8 [n, 3, 32, 32], each the mean of BLOCK x BLOCK of them, [n, 192]: of all 3072 a
    covariance would take more samples than there are."""
    return F.avg_pool2d(images.float() / 127.5 - 1, BLOCK).flatten(1)


def distances(images: Tensor, path: str) -> dict[str, float]:
    """Frechet distances of images uint8 [n, 3, 32, 32] from the real ones, by random features and by coarse pixels."""
    features, pixels, _ = _real(path)
    return {
        "fd_random": frechet(Gaussian.of(convolved(images)), features),
        "fd_pixels": frechet(Gaussian.of(coarse(images)), pixels),
    }


def floor(path: str) -> dict[str, float]:
    """The distances of as many other real photographs: what samples without fault would have."""
    return distances(_real(path)[2], path)


DIGITS = Problem(digits, open_source, RATES, judge_digits, "frechet")
CIFAR = Problem(photographs, open_photographs, RATES, judge_photographs, "fd_random")
