"""MeanFlow: the network learns the average velocity between two times (Geng et al. 2025, arXiv 2505.13447).

u(x_t, t, s) is the average of the velocity along the path from t down to s, so x_s = x_t + (s - t) u: the solution
function with "euler" coefficients, whose N is u. With the velocity target v of the look-ahead, guided or not,

    u_tgt = v - (t - s) du/dt,   du/dt = (v . d/dx + d/dt) u(x_t, t, s)   (equation 10; without gradient)
    loss  = mean_i |u - u_tgt|^2 / (|u - u_tgt|^2 + eps)^p,   |.|^2 the sum over a sample, the denominator no gradient

du/dt is a quotient of increments, (N(x_l, l, s) - N(x_t, t, s)) / (l - t) with x_l = x_t + (l - t) v and l = t - STEP:
the pair of points that the consistency loss has, only closer, so all that is there for its quotient serves.
"""

import torch
from torch import Tensor

from .flow import per_sample

STEP = 3e-4
"""t - l, the same for every way to an increment, as one may have to take another's place. Against forward mode in
float64 du/dt is off by half of it times the second derivative, and by rounding: a pair of float32 forwards by some
1e-7 N / STEP, increments by that of their products."""


def ordered_times(
    n: int, law: tuple[float, float], source: torch.Generator, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """t and s [n]: the larger and the smaller of two logit-normal times. law: mean and deviation of their logits."""
    mean, deviation = law
    drawn = torch.randn(2, n, generator=source, device=source.device, dtype=dtype)
    both = torch.sigmoid(mean + deviation * drawn)
    return both.amax(0), both.amin(0)


def derivative(increment: Tensor, t: Tensor, l: Tensor) -> Tensor:
    """du/dt [B, C, H, W] of the increment from t to l [B]."""
    return increment / per_sample(l - t, increment)


def average_velocity_target(velocity: Tensor, t: Tensor, s: Tensor, du: Tensor) -> Tensor:
    """u_tgt [B, C, H, W] (equation 10) of the velocity target and du/dt [B, C, H, W]."""
    return velocity - per_sample(t - s, velocity) * du
