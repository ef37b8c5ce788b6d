"""How far a network is from the exact solution, and how far its samples are from the data."""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.exact.mixture import Mixture
from benchmarks.studies.mixtures.problems import Held, solved, velocity
from soflow_fast.config.schema import SamplingMethod
from soflow_fast.flow import SolutionFlow
from soflow_fast.rng import generator
from soflow_fast.sampling import sample

DIRECTIONS = 64
"""Directions onto which samples are projected."""
METHODS: tuple[tuple[SamplingMethod, tuple[int, ...]], ...] = (
    ("renoise", (1, 2, 4)),
    ("consecutive", (2, 4)),
    ("euler", (1, 2, 4, 10)),
)
"""Ways to sample and their numbers of calls. One call of "consecutive" is one of "renoise"."""


def rms(difference: Tensor) -> float:
    """Root mean square length of vectors [n, D]."""
    return float(difference.square().sum(1).mean().sqrt())


def errors(flow: SolutionFlow, at: Held) -> dict[str, float]:
    """The errors of a network: f(x_1, 1, 0) and f(x_t, t, s) in units of the data's spread, the velocity in units
    of the exact one's root mean square."""
    ends = [solved(flow, points.x, points.t, points.s) - points.exact for points in (at.one_step, at.within)]
    found = velocity(flow, at.within.x, at.within.t) - at.velocity
    return {
        "one_step": rms(ends[0]) / at.spread,
        "within": rms(ends[1]) / at.spread,
        "velocity": rms(found) / rms(at.velocity),
    }


def sliced_distance(a: Tensor, b: Tensor) -> float:
    """The mean over `DIRECTIONS` random directions of the Wasserstein-1 distance of two sets' projections [n, D].

    Of two such sets it is the mean distance of their sorted values. It needs no pairing of noise and data.
    """
    directions = torch.randn(a.shape[1], DIRECTIONS, generator=generator(0, 0, 0, "directions"), dtype=torch.float64)
    directions = directions / directions.norm(dim=0)
    return float(((a @ directions).sort(0).values - (b @ directions).sort(0).values).abs().mean())


def floor(data: Mixture, at: Held, sets: int = 10) -> float:
    """The mean sliced distance between the held data and as much other data, in units of the data's spread."""
    source = generator(0, 0, 0, "floor")
    found = [sliced_distance(data.sample(len(at.data), source)[0], at.data) for _ in range(sets)]
    return sum(found) / sets / at.spread


def by_calls(flow: SolutionFlow, at: Held) -> Iterator[dict]:
    """Samples of a network in 1, 2, 4 or 10 calls: their distance to the data, and, where nothing but the first noise
    is random, their error against the exact end of the same noise."""
    source = generator(0, 0, 0, "noise again")
    first = at.noise.float()[:, :, None, None]
    again = [torch.randn(first.shape, generator=source) for _ in range(3)]
    for method, calls in METHODS:
        if not flow.solves and method != "euler":
            continue
        for nfe in calls:
            noise = [first, *again[: nfe - 1]] if method == "renoise" else [first]
            x = sample(flow, nfe=nfe, method=method, noise=noise)[:, :, 0, 0].double()
            row = {"method": method, "calls": nfe, "distance": sliced_distance(x, at.data) / at.spread}
            if method != "renoise" or nfe == 1:
                row["error"] = rms(x[: len(at.one_step.x)] - at.one_step.exact) / at.spread
            yield row
