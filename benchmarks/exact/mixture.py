"""A mixture of Gaussians as data: its velocity in closed form, and its solution function by integration.

With x_0 from the mixture and x_1 from N(0, I), x_t = alpha(t) x_0 + beta(t) x_1 is a mixture too, and the velocity that
flow matching tends to, v(x, t) = E[alpha'(t) x_0 + beta'(t) x_1 | x_t = x] (arXiv 2209.03003; arXiv 2512.15657), is a
sum over its components. f(x, t, s) is where the ODE dx/dt = v(x, t) through x at time t is at time s.

All is float64 on the CPU: points are [B, D], times [B], K components. Covariances are diagonal; data whose covariances
share another orthogonal basis is described in that basis, where the noise is N(0, I) as well.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from soflow_fast.config.schema import FlowPath

HALF_PI = math.pi / 2


@dataclass(frozen=True)
class Mixture:
    """sum_k weights[k] N(means[k], diag(deviations[k]^2)).

    weights [K] sum to 1; means and deviations [K, D], deviations above 0. path: as `SolutionFlow`'s. Raises ValueError
    for other shapes or numbers.
    """

    weights: Tensor
    means: Tensor
    deviations: Tensor
    path: FlowPath = "linear"

    def __post_init__(self) -> None:
        K, D = self.means.shape
        if self.weights.shape != (K,) or self.deviations.shape != (K, D):
            raise ValueError("weights must be [K], means and deviations [K, D]")
        if (self.weights <= 0).any() or abs(float(self.weights.sum()) - 1) > 1e-9:
            raise ValueError("weights must be above 0 and sum to 1")
        if (self.deviations <= 0).any():
            raise ValueError("deviations must be above 0")
        if any(value.dtype != torch.float64 for value in (self.weights, self.means, self.deviations)):
            raise ValueError("weights, means and deviations must be float64")

    def sample(self, n: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
        """n data points [n, D], and the component of each [n]."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=source)
        z = torch.randn(n, self.means.shape[1], generator=source, dtype=torch.float64)
        return self.means[k] + self.deviations[k] * z, k

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha, beta, alpha', beta' at times t, of the shape of t."""
        if self.path == "linear":
            one = torch.ones_like(t)
            return 1 - t, t, -one, one
        angle = HALF_PI * t
        return angle.cos(), angle.sin(), -HALF_PI * angle.sin(), HALF_PI * angle.cos()

    def responsibilities(self, x: Tensor, t: Tensor) -> Tensor:
        """The probability of each component given x_t = x, [B, K]."""
        alpha, beta, *_ = (value[:, None, None] for value in self.scales(t))
        variance = (alpha * self.deviations) ** 2 + beta**2  # [B, K, D]
        square = (x[:, None] - alpha * self.means) ** 2 / variance
        return (self.weights.log() - 0.5 * (square + variance.log()).sum(-1)).softmax(-1)

    def velocity(self, x: Tensor, t: Tensor, k: Tensor | None = None) -> Tensor:
        """v(x, t) [B, D]; k [B]: the velocity given the component too, as a network with labels learns it."""
        alpha, beta, d_alpha, d_beta = (value[:, None, None] for value in self.scales(t))
        variance = (alpha * self.deviations) ** 2 + beta**2
        whitened = (x[:, None] - alpha * self.means) / variance
        x0 = self.means + alpha * self.deviations**2 * whitened  # E[x_0 | x, k], [B, K, D]
        each = d_alpha * x0 + d_beta * beta * whitened
        if k is not None:
            return each[torch.arange(len(x)), k]
        return (self.responsibilities(x, t)[..., None] * each).sum(1)

    def solution(self, x: Tensor, t: Tensor, s: Tensor, k: Tensor | None = None, steps: int = 128) -> Tensor:
        """f(x, t, s) [B, D], by `steps` steps of the classical Runge-Kutta method. k: as for `velocity`.

        Its error falls with steps^-4; `solution_error` measures it.
        """
        h = (s - t) / steps
        for step in range(steps):
            at = t + step * h
            a = self.velocity(x, at, k)
            b = self.velocity(x + 0.5 * h[:, None] * a, at + 0.5 * h, k)
            c = self.velocity(x + 0.5 * h[:, None] * b, at + 0.5 * h, k)
            d = self.velocity(x + h[:, None] * c, at + h, k)
            x = x + h[:, None] / 6 * (a + 2 * b + 2 * c + d)
        return x

    def solution_error(self, x: Tensor, t: Tensor, s: Tensor, k: Tensor | None = None, steps: int = 128) -> float:
        """The largest distance between `solution` by `steps` steps and by twice as many."""
        difference = self.solution(x, t, s, k, steps) - self.solution(x, t, s, k, 2 * steps)
        return difference.norm(dim=1).max().item()

    def pair(self, x: Tensor, t: Tensor, source: torch.Generator) -> tuple[Tensor, Tensor]:
        """Data x_0 and noise x_1 [B, D] drawn from what they can have been, given that x_t = x at times t > 0."""
        alpha, beta, *_ = (value[:, None] for value in self.scales(t))
        k = torch.multinomial(self.responsibilities(x, t), 1, generator=source)[:, 0]
        mean, variance = self.means[k], self.deviations[k] ** 2
        total = alpha**2 * variance + beta**2
        centre = mean + alpha * variance / total * (x - alpha * mean)
        z = torch.randn(x.shape, generator=source, dtype=torch.float64)
        x0 = centre + (variance * beta**2 / total).sqrt() * z
        return x0, (x - alpha * x0) / beta


def ring(components: int = 8, radius: float = 2.0, deviation: float = 0.2, path: FlowPath = "linear") -> Mixture:
    """In the plane: equal Gaussians on a circle."""
    angle = 2 * math.pi * torch.arange(components, dtype=torch.float64) / components
    means = radius * torch.stack([angle.cos(), angle.sin()], 1)
    weights = torch.full((components,), 1 / components, dtype=torch.float64)
    return Mixture(weights, means, torch.full_like(means, deviation), path)


def scattered(
    dimensions: int = 16, components: int = 8, seed: int = 0, spread: float = 1.0, path: FlowPath = "linear"
) -> Mixture:
    """In any number of dimensions: Gaussians of unequal weights and axes, with means from N(0, spread^2 I)."""
    source = torch.Generator().manual_seed(seed)
    weights = torch.rand(components, generator=source, dtype=torch.float64) + 0.5
    means = spread * torch.randn(components, dimensions, generator=source, dtype=torch.float64)
    axes = 0.1 + 0.4 * torch.rand(components, dimensions, generator=source, dtype=torch.float64)
    return Mixture(weights / weights.sum(), means, axes, path)
