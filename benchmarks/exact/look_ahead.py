"""What a finite look-ahead and a weight make of the solution function, on a mixture whose own solution is known.

The consistency loss compares f(x, t, s) with f(x_l, l, s), where l = t + r (s - t) and x_l = x + (l - t) v
(arXiv 2512.15657). Where its gradient vanishes, with p = 0 and a network that can be anything,

    f_r(x, t, s) = E[f_r(x + (l - t) v, l, s)],   v = alpha'(t) x_0 + beta'(t) x_1 given x_t = x, or its mean v(x, t).

So f_r is the mean end of a chain of steps along drawn velocities, each a fraction r of what is left to s; along mean
velocities it is Euler's method on these times. On the linear path a drawn step goes to the same pair's point at l, so
the chain has the law of the path at each of its times, and f_r is a mean over random ends.

One link of the chain, g = l - t, changes the mean of an exact f by

    E[f(x + g v, l, s) | x] - f(x, t, s) = g^2/2 (tr(Cov(v | x) d2f/dx2) - df/dx . dv(x, t)/dt) + O(g^3),

where dv/dt is taken along the ODE: the second term is Euler's error, the first is there because v is random. As
|g| = r (t - s) and the links are as dense as 1 / |g|, the sum over the chain is of the order of r. Neither has a part
that grows with the steps of training.

Draws have no part of first order: along the exact path f changes by J = df/dx times (l - t)(v - mean), whose mean is 0,
so it is subtracted, and few draws are enough for a small r. Any J has that mean: one of a norm above STEEPEST is
shortened, as f is not linear there as far as draws reach.

A detached weight w = (mean(delta^2) + eps)^-p depends on the random velocity too. The gradient of flow matching
vanishes where E[w (N - v) | x] = 0: N is a weighted mean of v, in which those far from N count less.

All is float64: points [B, D], times [B], or one number where all points have the same.
"""

import itertools
import math

import torch
from torch import Tensor

from benchmarks.exact.mixture import Mixture
from soflow_fast.objective import TIME_GAP

NEAR = 5e-3
"""The chain goes on until this fraction of t - s is left; the exact solution takes the rest."""
STEEPEST = 2.0
"""The largest norm of a J that is subtracted."""
SHIFT = 1e-4
"""The distance of the points by which J is differenced."""
TOGETHER = 20_000
"""Ends that are drawn at a time: their tensors stay in the caches."""


def quotient_bias(
    mixture: Mixture, x: Tensor, t: Tensor, s: Tensor, r: float, draws: int = 0, source: torch.Generator | None = None
) -> Tensor:
    """E[q] at the exact solution, [B, D], where q = (f(x, t, s) - f(x_l, l, s)) / (t - l): 0 if r did no harm.

    draws: of the velocity at each point, from `source`; 0: the mean velocity.
    """
    h = (r * (s - t))[:, None]
    l = t + r * (s - t)
    mean = mixture.velocity(x, t)
    f, ahead = mixture.solution(x, t, s), mixture.solution(x + h * mean, l, s)
    if draws == 0:
        return (ahead - f) / h
    assert source is not None
    slope = shortened(jacobian(mixture, x + h * mean, l, s))
    total = torch.zeros_like(x)
    for _ in range(draws):
        moved = h * (drawn_velocity(mixture, x, t, source) - mean)
        total += mixture.solution(x + h * mean + moved, l, s) - (slope @ moved[..., None])[..., 0]
    return (total / draws - f) / h


def fixed_point(mixture: Mixture, x: Tensor, t: float, s: float, r: float) -> Tensor:
    """f_r(x, t, s) [B, D] along mean velocities."""
    times = chain(t, s, r)
    for now, after in itertools.pairwise(times):
        x = x + (after - now) * mixture.velocity(x, _all(now, x))
    return _rest(mixture, x, times[-1], s)


def drawn_fixed_point(
    mixture: Mixture,
    x: Tensor,
    t: float,
    s: float,
    r: float,
    draws: int,
    source: torch.Generator,
    subtract: bool = True,
) -> Tensor:
    """Draws whose mean is f_r(x, t, s) along drawn velocities, [draws, B, D].

    subtract: the part of first order, which pays where few dimensions make J cheap and where f is smooth, as at most
    points; a mean square over points is made by the others.
    """
    times, slopes = chain(t, s, r), path_slopes(mixture, x, t, s, r) if subtract else None
    each = max(1, TOGETHER // len(x))
    parts = [min(each, draws - k) for k in range(0, draws, each)]
    return torch.cat([_drawn_ends(mixture, x, times, s, slopes, part, source) for part in parts])


def _drawn_ends(
    mixture: Mixture,
    x: Tensor,
    times: list[float],
    s: float,
    slopes: list[Tensor] | None,
    draws: int,
    source: torch.Generator,
) -> Tensor:
    B, D = x.shape
    x = x.repeat(draws, 1)
    first_order = torch.zeros_like(x)
    for k, (now, after) in enumerate(itertools.pairwise(times)):
        t = _all(now, x)
        v = drawn_velocity(mixture, x, t, source)
        if slopes:
            moved = ((after - now) * (v - mixture.velocity(x, t))).reshape(draws, B, D)
            first_order += (slopes[k] @ moved[..., None])[..., 0].reshape(-1, D)
        x = x + (after - now) * v
    return (_rest(mixture, x, times[-1], s) - first_order).reshape(draws, B, D)


def weighted_velocity(
    mixture: Mixture, x: Tensor, t: Tensor, p: float, eps: float, draws: int, source: torch.Generator, rounds: int = 200
) -> tuple[Tensor, Tensor]:
    """What flow matching under the weight (mean(delta^2) + eps)^-p tends to at x, the N with E[w (v - N)] = 0, and
    beside it the mean of the same draws of v, which is N for p = 0; [B, D] both.

    N is found from the mean by `rounds` of a weighted mean. N less the mean has less noise than N less the exact
    velocity.
    """
    v = drawn_velocity(mixture, x.repeat(draws, 1), t.repeat(draws), source).reshape(draws, *x.shape)
    mean = found = v.mean(0)
    for _ in range(rounds if p else 0):
        w = ((v - found).square().mean(-1, keepdim=True) + eps) ** -p
        found = (w * v).sum(0) / w.sum(0)
    return found, mean


def drawn_velocity(mixture: Mixture, x: Tensor, t: Tensor, source: torch.Generator) -> Tensor:
    """v [B, D] of a pair of data and noise that can have led to x at time t > 0."""
    x0, x1 = mixture.pair(x, t, source)
    _, _, d_alpha, d_beta = (value[:, None] for value in mixture.scales(t))
    return d_alpha * x0 + d_beta * x1


def chain(t: float, s: float, r: float) -> list[float]:
    """The times of a chain from t until at most NEAR of t - s is left: after each the engine's l, not beyond s."""
    times = [t]
    while times[-1] - s > NEAR * (t - s):
        now = times[-1]
        times.append(max(min(now + r * (s - now), now - TIME_GAP), s))
    return times


def jacobian(mixture: Mixture, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """J = df/dx [B, D, D] of the exact solution, by central differences."""
    columns = []
    for shift in SHIFT * torch.eye(x.shape[1], dtype=x.dtype):
        columns.append((mixture.solution(x + shift, t, s) - mixture.solution(x - shift, t, s)) / (2 * SHIFT))
    return torch.stack(columns, -1)


def path_slopes(mixture: Mixture, x: Tensor, t: float, s: float, r: float) -> list[Tensor]:
    """J [B, D, D] at the exact path of x after each step of the chain, from there to s, shortened."""
    B, D = x.shape
    shifts = SHIFT * torch.eye(D, dtype=x.dtype)
    points = torch.cat([x, *(x + shift for shift in shifts), *(x - shift for shift in shifts)])
    times, from_start = chain(t, s, r), []
    inner = max(1, math.ceil(20 * r))
    for now, after in itertools.pairwise(times):
        points = mixture.solution(points, _all(now, points), _all(after, points), steps=inner)
        from_start.append(_differences(points, B, D))
    whole = _differences(_rest(mixture, points, times[-1], s), B, D)
    return [shortened(whole @ torch.linalg.inv(slope)) for slope in from_start]


def shortened(slope: Tensor) -> Tensor:
    """J [B, D, D] with a norm of at most STEEPEST."""
    return slope * (STEEPEST / torch.linalg.matrix_norm(slope, keepdim=True)).clamp_max(1)


def _differences(points: Tensor, B: int, D: int) -> Tensor:
    _, *shifted = points.reshape(2 * D + 1, B, D)
    return torch.stack([(shifted[d] - shifted[D + d]) / (2 * SHIFT) for d in range(D)], -1)


def _rest(mixture: Mixture, x: Tensor, t: float, s: float) -> Tensor:
    """The exact solution over what a chain has left."""
    return mixture.solution(x, _all(t, x), _all(s, x), steps=8)


def _all(t: float, x: Tensor) -> Tensor:
    return torch.full((len(x),), t, dtype=x.dtype)
