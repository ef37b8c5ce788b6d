"""What a finite look-ahead makes of the solution function, on a mixture whose own solution is known.

The consistency loss compares f(x, t, s) with f(x_l, l, s), where l = t + r (s - t) and x_l = x + (l - t) v
(arXiv 2512.15657). Where its gradient vanishes, with p = 0 and a network that can be anything,

    f_r(x, t, s) = E[f_r(x + (l - t) v, l, s)],   v = alpha'(t) x_0 + beta'(t) x_1 given x_t = x, or its mean v(x, t).

So f_r is the mean end of a chain of steps along drawn velocities, each a fraction r of what is left to s; along mean
velocities it is Euler's method on these times. Draws have no part of first order: along the exact path f changes by
J = df/dx times (l - t)(v - mean), whose mean is 0, so it is subtracted, and few draws are enough for a small r.
Any J has that mean: one of a norm above STEEPEST is shortened, as f is not linear there as far as draws reach.

All is float64: points [B, D], times [B].
"""

import math

import torch
from torch import Tensor

from benchmarks.exact.mixture import Mixture

NEAR = 5e-3
"""The chain goes on until this fraction of t - s is left; the exact solution takes the rest."""
STEEPEST = 2.0
"""The largest norm of a J that is subtracted."""
SHIFT = 1e-4
"""The distance of the points by which J is differenced."""


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


def fixed_point(mixture: Mixture, x: Tensor, t: Tensor, s: Tensor, r: float) -> Tensor:
    """f_r(x, t, s) [B, D] along mean velocities."""
    for _ in range(steps_of(r)):
        h = r * (s - t)
        x, t = x + h[:, None] * mixture.velocity(x, t), t + h
    return mixture.solution(x, t, s, steps=8)


def drawn_fixed_point(
    mixture: Mixture, x: Tensor, t: Tensor, s: Tensor, r: float, draws: int, source: torch.Generator
) -> Tensor:
    """Draws whose mean is f_r(x, t, s) along drawn velocities, [draws, B, D]."""
    B, D = x.shape
    slopes = path_slopes(mixture, x, t, s, r)
    x, t, s = x.repeat(draws, 1), t.repeat(draws), s.repeat(draws)
    first_order = torch.zeros_like(x)
    for slope in slopes:
        h = r * (s - t)
        mean, v = mixture.velocity(x, t), drawn_velocity(mixture, x, t, source)
        moved = (h[:, None] * (v - mean)).reshape(draws, B, D)
        first_order += (slope @ moved[..., None])[..., 0].reshape(-1, D)
        x, t = x + h[:, None] * v, t + h
    return (mixture.solution(x, t, s, steps=8) - first_order).reshape(draws, B, D)


def weighted_velocity(
    mixture: Mixture, x: Tensor, t: Tensor, p: float, eps: float, draws: int, source: torch.Generator
) -> Tensor:
    """What flow matching under the weight (mean(delta^2) + eps)^-p tends to at x, [B, D]: with p = 0 the mean of the
    velocities, else m with E[w (v - m)] = 0 for w of v - m, found from the mean on by 100 rounds of a weighted mean."""
    many = (x.repeat(draws, 1), t.repeat(draws))
    v = drawn_velocity(mixture, *many, source).reshape(draws, *x.shape)
    m = v.mean(0)
    for _ in range(100 if p else 0):
        w = ((v - m).square().mean(-1, keepdim=True) + eps) ** -p
        m = (w * v).sum(0) / w.sum(0)
    return m


def drawn_velocity(mixture: Mixture, x: Tensor, t: Tensor, source: torch.Generator) -> Tensor:
    """v [B, D] of a pair of data and noise that can have led to x at time t > 0."""
    x0, x1 = mixture.pair(x, t, source)
    _, _, d_alpha, d_beta = (value[:, None] for value in mixture.scales(t))
    return d_alpha * x0 + d_beta * x1


def steps_of(r: float) -> int:
    """The steps of a chain, each a fraction r of what is left, until NEAR of it is."""
    return max(1, math.ceil(math.log(NEAR) / math.log1p(-r)))


def jacobian(mixture: Mixture, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """J = df/dx [B, D, D] of the exact solution, by central differences."""
    columns = []
    for shift in SHIFT * torch.eye(x.shape[1], dtype=x.dtype):
        columns.append((mixture.solution(x + shift, t, s) - mixture.solution(x - shift, t, s)) / (2 * SHIFT))
    return torch.stack(columns, -1)


def path_slopes(mixture: Mixture, x: Tensor, t: Tensor, s: Tensor, r: float) -> list[Tensor]:
    """J [B, D, D] at the exact path of x after each step of the chain, from there to s, shortened."""
    B, D = x.shape
    shifts = SHIFT * torch.eye(D, dtype=x.dtype)
    points = torch.cat([x, *(x + shift for shift in shifts), *(x - shift for shift in shifts)])
    now, end = t.repeat(2 * D + 1), s.repeat(2 * D + 1)
    from_start = []
    inner = max(1, math.ceil(20 * r))
    for _ in range(steps_of(r)):
        after = now + r * (end - now)
        points, now = mixture.solution(points, now, after, steps=inner), after
        from_start.append(_differences(points, B, D))
    whole = _differences(mixture.solution(points, now, end, steps=8), B, D)
    return [shortened(whole @ torch.linalg.inv(slope)) for slope in from_start]


def shortened(slope: Tensor) -> Tensor:
    """J [B, D, D] with a norm of at most STEEPEST."""
    return slope * (STEEPEST / torch.linalg.matrix_norm(slope, keepdim=True)).clamp_max(1)


def _differences(points: Tensor, B: int, D: int) -> Tensor:
    _, *shifted = points.reshape(2 * D + 1, B, D)
    return torch.stack([(shifted[d] - shifted[D + d]) / (2 * SHIFT) for d in range(D)], -1)
