"""The distance of the losses' minimisers from the exact functions, by chains and weighted means: no training."""

import torch

from benchmarks.exact.mixture import Mixture, ring, scattered
from benchmarks.studies.mixtures.fixed_point import bias, weighted_velocity
from benchmarks.studies.mixtures.measures import floor, rms
from benchmarks.studies.mixtures.problems import RING, SCATTERED, Points, held, mixture
from soflow_fast.rng import generator

R = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002)
WIDE = "wide ring"
"""The ring of Gaussians so wide (0.8) that f has no steep places: the order of the bias in r is seen there."""
POWERS = (0.25, 0.5, 0.75, 1.0)
SIZES = (2, 4, 8, 16, 32, 64)
"""Dimensions of scattered mixtures."""
EPS = 0.01


def biases(name: str, points: int = 300, chains: int = 600, rates: tuple[float, ...] = R) -> list[dict]:
    """A row for each r: the distance of f_r(x_1, 1, 0) from the exact f in units of the data's deviation.

    chains: of each noise in units of 1 / r, at least 16."""
    torch.set_num_threads(1)
    data = ring(deviation=0.8) if name == WIDE else mixture(name)
    if name == WIDE:
        source = generator(0, 0, 0, name)
        x = torch.randn(points, 2, generator=source, dtype=torch.float64)
        one = torch.ones(points, dtype=torch.float64)
        at, deviation = Points(x, one, 0 * one, data.solution(x, one, 0 * one)), spread(data)
    else:
        at, deviation = held(name).one_step.first(points), held(name).deviation
    rows = []
    for r in rates:
        copies = max(16, 2 * round(chains * r / 2))
        found = bias(data, at, r, copies, generator(0, 0, 0, f"bias of {name} at {r:g}"))
        row = {key: value / deviation for key, value in found.items()}
        rows.append({"kind": "bias", "problem": name, "r": r, "points": len(at.x), "chains": copies, **row})
    return rows


def spread(data: Mixture) -> float:
    """Root mean square distance of the data to its mean."""
    mean = (data.weights[:, None] * data.means).sum(0)
    each = ((data.means - mean).square() + data.deviations.square()).sum(1)
    return float((data.weights * each).sum().sqrt())


def weighted(points: int = 200, pairs: int = 500, sizes: tuple[int, ...] = SIZES) -> list[dict]:
    """A row for each mixture and p: the distance of the weighted loss's velocity from the exact one, in units of the
    exact one's root mean square, at points of the path at a uniform t."""
    torch.set_num_threads(1)
    rows = []
    problems = {RING: ring(), **{f"{SCATTERED}, {D} dimensions": scattered(D) for D in sizes}}
    for name, data in problems.items():
        source = generator(0, 0, 0, "weighted")
        t = torch.rand(points, generator=source, dtype=torch.float64)
        x1 = torch.randn(points, data.means.shape[1], generator=source, dtype=torch.float64)
        alpha, beta, *_ = (value[:, None] for value in data.scales(t))
        x = alpha * data.sample(points, source)[0] + beta * x1
        exact = rms(data.velocity(x, t))
        for p in POWERS:
            found = rms(weighted_velocity(data, x, t, p, EPS, pairs, steps=100)) / exact
            rows.append({"kind": "weighted", "problem": name, "dimensions": x.shape[1], "p": p, "velocity": found})
    return rows


def floors() -> list[dict]:
    """The distance between sets of exact samples, of each problem."""
    torch.set_num_threads(1)
    return [
        {"kind": "floor", "problem": name, "distance": floor(mixture(name), held(name))} for name in (RING, SCATTERED)
    ]
