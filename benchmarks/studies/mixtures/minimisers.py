"""The distance of the losses' minimisers from the exact functions, by chains and weighted means: no training."""

import torch
from torch import Tensor

from benchmarks.exact.estimates import halves, root_mean_square
from benchmarks.exact.look_ahead import drawn_fixed_point, fixed_point, weighted_velocity
from benchmarks.exact.mixture import Mixture, ring, scattered
from benchmarks.studies.mixtures.measures import floor, rms
from benchmarks.studies.mixtures.problems import HELD, RING, SCATTERED, held, mixture
from soflow_fast.rng import generator

R = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002)
WIDE = "wide ring"
"""The ring of Gaussians so wide (0.8) that f has no steep places: the order of the bias in r is seen there."""
POWERS = (0.25, 0.5, 0.75, 1.0)
SIZES = (2, 4, 8, 16, 32, 64)
"""Dimensions of scattered mixtures."""
EPS = 0.01
DECIDED = 0.99
"""A point whose likeliest component has more than this probability is decided."""


def chains(r: float) -> int:
    """Chains of each noise, an even number. They are few: of a mean square over many noises these make the noise."""
    return max(8, 2 * round(50 * r))


def means(data: Mixture, noise: Tensor, r: float, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """f_r(noise, 1, 0) [n, D], twice, each with noise of its own."""
    return halves(drawn_fixed_point(data, noise, 1.0, 0.0, r, chains(r), source, subtract=False))


def biases(name: str, points: int = HELD, rates: tuple[float, ...] = R) -> list[dict]:
    """A row for each r: the distance of f_r(x_1, 1, 0) from the exact f, root mean square over noises with its standard
    error, along drawn velocities ("pair") and along the mean one ("marginal"), in units of the data's spread."""
    torch.set_num_threads(1)
    if name == WIDE:
        data = ring(deviation=0.8)
        noise = torch.randn(points, 2, generator=generator(0, 0, 0, name), dtype=torch.float64)
        one = torch.ones(points, dtype=torch.float64)
        exact, unit = data.solution(noise, one, 0 * one), spread(data)
    else:
        data, (noise, _, _, exact), unit = mixture(name), held(name).one_step.first(points), held(name).spread
    rows = []
    for r in rates:
        a, b = means(data, noise, r, generator(0, 0, 0, f"bias of {name} at {r:g}"))
        row = {"kind": "bias", "problem": name, "r": r, "points": len(noise), "chains": chains(r)}
        ways = {"pair": (a - exact, b - exact), "marginal": (fixed_point(data, noise, 1.0, 0.0, r) - exact,)}
        for way, found in ways.items():
            distance, error = root_mean_square(*found)
            row |= {way: distance / unit, f"{way}_standard_error": error / unit}
        rows.append(row)
    return rows


def spread(data: Mixture) -> float:
    """Root mean square distance of the data to its mean."""
    mean = (data.weights[:, None] * data.means).sum(0)
    each = ((data.means - mean).square() + data.deviations.square()).sum(1)
    return float((data.weights * each).sum().sqrt())


def weighted(points: int = 400, pairs: int = 500, sizes: tuple[int, ...] = SIZES) -> list[dict]:
    """A row for each mixture and p, at points of the path at a uniform t: the distance of the weighted loss's velocity
    from the mean one, root mean square in units of the exact one's, and that at undecided points alone, in units of
    theirs; the share of those; and, as what the draws leave unknown, the distance of their mean from the exact one."""
    torch.set_num_threads(1)
    rows = []
    problems = {RING: ring(), **{f"{SCATTERED}, {D} dimensions": scattered(D) for D in sizes}}
    for name, data in problems.items():
        source = generator(0, 0, 0, "weighted")
        t = torch.rand(points, generator=source, dtype=torch.float64)
        x1 = torch.randn(points, data.means.shape[1], generator=source, dtype=torch.float64)
        alpha, beta, *_ = (value[:, None] for value in data.scales(t))
        x = alpha * data.sample(points, source)[0] + beta * x1
        exact = data.velocity(x, t)
        undecided = data.responsibilities(x, t).amax(1) <= DECIDED
        for p in POWERS:
            found, mean = weighted_velocity(data, x, t, p, EPS, pairs, generator(0, 0, 0, "weighted velocities"))
            row = {"kind": "weighted", "problem": name, "dimensions": x.shape[1], "p": p}
            row |= {"velocity": rms(found - mean) / rms(exact), "unknown": rms(mean - exact) / rms(exact)}
            row |= {"undecided": float(undecided.double().mean())}
            if undecided.any():
                row["velocity_undecided"] = rms((found - mean)[undecided]) / rms(exact[undecided])
            rows.append(row)
    return rows


def floors() -> list[dict]:
    """The distance between sets of exact samples, of each problem."""
    torch.set_num_threads(1)
    return [
        {"kind": "floor", "problem": name, "distance": floor(mixture(name), held(name))} for name in (RING, SCATTERED)
    ]
