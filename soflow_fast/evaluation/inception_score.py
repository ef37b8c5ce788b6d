"""The Inception Score: how sure a classifier is of each image, and how many classes it sees (arXiv 1606.03498)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..rng import generator

SPLITS = 10


class InceptionScore(NamedTuple):
    """The mean over splits, and its deviation among them."""

    mean: float
    deviation: float


def inception_score(logits: Tensor, *, splits: int = SPLITS, seed: int = 0) -> InceptionScore:
    """exp E[KL(p(y | x) || p(y))] of logits [N, K], in float64, over `splits` parts of a shuffle.

    Of 50 000 images these are the splits of 5000 that ADM's evaluator takes; the shuffle keeps images that lie in the
    order of their classes from being a few classes to a split. Raises ValueError for fewer images than splits, and for
    logits not finite.
    """
    if len(logits) < splits:
        raise ValueError(f"{splits} splits need as many images, got {len(logits)}")
    if not logits.isfinite().all():
        raise ValueError("logits are not finite")
    order = torch.randperm(len(logits), generator=generator(seed, 0, 0, "inception score"))
    scores = []
    for part in logits[order].tensor_split(splits):
        log_p = part.double().log_softmax(1)
        log_mean = log_p.logsumexp(0) - math.log(len(part))
        divergence = (log_p.exp() * (log_p - log_mean)).sum(1)
        scores.append(divergence.mean().exp())
    values = torch.stack(scores)
    return InceptionScore(float(values.mean()), float(values.std(correction=0)))
