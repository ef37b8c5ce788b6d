"""What the losses would be minimised by if a network could be anything: no training.

**Consistency at a constant r, p = 0.** The gradient vanishes where E[q | x_t = x] = 0 with the look-ahead held fixed:

    f_r(x, t, s) = E[f_r(x + (l - t) v, l, s) | x_t = x],    l = min(t + r (s - t), t - 1e-4),    f_r(x, s, s) = x.

v is the velocity of a pair of data and noise drawn given x_t = x. On the linear path x + (l - t) v is the same pair's
point at l, so f_r(x, t, s) is the mean of where a Markov chain from x at t arrives at s: it draws a pair anew at each
of the times t, l, l', ... and goes on to the pair's point at the next. Each point of the chain has the law of the path
at its time, and f_r is a mean over random ends: it is drawn towards the middle of the data. With v(x, t) = E[v | x] in
the place of v the recursion is Euler's method at the same times.

One link of the chain, g = l - t, changes the mean of an exact f by

    E[f(x + g v, l, s) | x] - f(x, t, s) = g^2/2 (tr(Cov(v | x) d2f/dx2) - df/dx . dv(x, t)/dt) + O(g^3),

where dv/dt is taken along the ODE: the second term is Euler's error, the first is there because v is random. As
|g| = r (t - s) and the links are as dense as 1 / |g|, the sum over the chain is of the order of r. Neither has a part
that grows with the steps of training.

**The weights of p > 0.** A detached weight w = (mean(delta^2) + eps)^-p depends on the random velocity. The gradient of
flow matching vanishes where E[w (N - v) | x] = 0: N is a weighted mean of v, in which those far from N count less. It
is the mean for p = 0, and for p = 1/2, eps = 0 the geometric median of v.
"""

import torch
from torch import Tensor

from benchmarks.exact.look_ahead import drawn_velocity
from benchmarks.exact.mixture import Mixture
from benchmarks.studies.mixtures.problems import Points
from soflow_fast.objective import TIME_GAP

CHAINS = 20_000
"""Chains that run at a time: their tensors stay in the caches."""


def middle(t: Tensor, s: Tensor, r: float) -> Tensor:
    """l [n] of the engine, not beyond s."""
    return torch.maximum(torch.minimum(t + r * (s - t), t - TIME_GAP), s)


def arrived(data: Mixture, x: Tensor, t: Tensor, s: Tensor, r: float, source: torch.Generator | None) -> Tensor:
    """Where the recursion from x [n, D] at t [n] is at s [n]; source: of the pairs, None: v(x, t) in their place."""
    while bool((t > s).any()):
        l = middle(t, s, r)
        if source is None:
            v = data.velocity(x, t)
        else:
            v = drawn_velocity(data, x, t, source)
        x, t = x + (l - t)[:, None] * v, l
    return x


def means(data: Mixture, at: Points, r: float, copies: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """f_r at points, twice [n, D]: from two halves of `copies` chains each, an even number."""
    n, D = at.x.shape
    halves = torch.zeros(2, n, D, dtype=torch.float64)
    for half in halves:
        left = copies // 2
        while left:
            now = min(left, max(1, CHAINS // n))
            x, t, s = (value.repeat(now, *[1] * (value.dim() - 1)) for value in (at.x, at.t, at.s))
            half += arrived(data, x, t, s, r, source).reshape(now, n, D).sum(0)
            left -= now
    halves /= copies // 2
    return halves[0], halves[1]


def bias(data: Mixture, at: Points, r: float, copies: int, source: torch.Generator) -> dict[str, float]:
    """The root mean square distance of f_r from the exact f, its standard error, and that of the recursion by v(x, t).

    The product of two independent means' differences has the square of the distance as its mean, without what noise
    adds to a square.
    """
    a, b = means(data, at, r, copies, source)
    product = ((a - at.exact) * (b - at.exact)).sum(1)
    square, deviation = float(product.mean()), float(product.std()) / len(product) ** 0.5
    distance = max(square, 0.0) ** 0.5
    euler = arrived(data, at.x, at.t, at.s, r, None) - at.exact
    return {
        "pair": distance,
        "pair_standard_error": deviation / (2 * distance) if distance else deviation**0.5,
        "marginal": float(euler.square().sum(1).mean().sqrt()),
    }


def weighted_velocity(
    data: Mixture, x: Tensor, t: Tensor, p: float, eps: float, pairs: int, steps: int = 200
) -> Tensor:
    """The N with E[w (N - v)] = 0 less the mean of v, [n, D], both over the same `pairs` velocities given x [n, D] at
    t [n].

    Found from the mean by `steps` of N <- E[w v] / E[w]. The same velocities in both, so that their noise cancels.
    """
    n, D = x.shape
    source = torch.Generator().manual_seed(0)
    v = drawn_velocity(data, x.repeat(pairs, 1), t.repeat(pairs), source).reshape(pairs, n, D)
    mean = found = v.mean(0)
    for _ in range(steps if p else 0):
        w = ((v - found).square().mean(2, keepdim=True) + eps) ** -p
        found = (w * v).sum(0) / w.sum(0)
    return found - mean
