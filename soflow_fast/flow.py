"""The path from data to noise, and the solution function on top of a network (arXiv 2512.15657).

Time t is in [0, 1]: t = 0 is data, t = 1 is noise. Times have shape [B]; images [B, C, H, W].
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .config import FlowConfig, validate_flow

HALF_PI = math.pi / 2


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1], so that it multiplies `like`, in its dtype."""
    return value.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))


class SolutionFlow(nn.Module):
    """f(x, t, s) = a(t, s) x + b(t, s) N(x, t, s): the state at time s of the velocity ODE through x at time t.

    | path | alpha(t), beta(t) |    | coefficients | a(t, s), b(t, s) |
    |---|---|---|---|---|
    | "linear" | 1 - t, t |    | "euler" | 1, s - t |
    | "trig" | cos(pi t / 2), sin(pi t / 2) |    | "trig" | cos(pi/2 (s - t)), sin(pi/2 (s - t)) |

    `network` is any module with the call `network(x, t, s, y)` and the attribute `num_classes`, the null label.
    Its parameters' names are `network.` and the network's own, as in the public checkpoints.
    """

    network: Any

    def __init__(self, network: nn.Module, path: str = "linear", coefficients: str = "euler") -> None:
        """`network(x, t, s, y)` gives N, of the shape of x. Raises ValueError for an unknown path or coefficients."""
        super().__init__()
        validate_flow(FlowConfig(path, coefficients))
        self.network = network
        self.path = path
        self.coefficients = coefficients

    def path_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha, beta and their derivatives alpha', beta' at t [B]."""
        if self.path == "linear":
            one = torch.ones_like(t)
            return 1 - t, t, -one, one
        cos, sin = torch.cos(HALF_PI * t), torch.sin(HALF_PI * t)
        return cos, sin, -HALF_PI * sin, HALF_PI * cos

    def point(self, x0: Tensor, x1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_t = alpha x_0 + beta x_1, and its velocity v_t = alpha' x_0 + beta' x_1, both [B, C, H, W]."""
        alpha, beta, dalpha, dbeta = (per_sample(c, x0) for c in self.path_coefficients(t))
        return alpha * x0 + beta * x1, dalpha * x0 + dbeta * x1

    def solution_coefficients(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """a(t, s) and b(t, s), [B]."""
        if self.coefficients == "euler":
            return torch.ones_like(t), s - t
        angle = HALF_PI * (s - t)
        return torch.cos(angle), torch.sin(angle)

    def velocity_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """da/ds(t, t) and db/ds(t, t), [B]: the velocity is their combination of x and N(x, t, t)."""
        slope = 1.0 if self.coefficients == "euler" else HALF_PI
        return torch.zeros_like(t), torch.full_like(t, slope)

    def coefficient_slopes(self, t: Tensor, l: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """(a(t, s) - a(l, s)) / (t - l) and the same of b, [B], without cancellation as l -> t."""
        if self.coefficients == "euler":
            return torch.zeros_like(t), -torch.ones_like(t)
        # cos A - cos B = -2 sin((A + B)/2) sin((A - B)/2), sin A - sin B = 2 cos((A + B)/2) sin((A - B)/2)
        middle = HALF_PI * (s - (t + l) / 2)
        half = HALF_PI * (t - l) / 2
        sinc = torch.sinc(half / math.pi) * HALF_PI  # 2 sin(half) / (t - l)
        return torch.sin(middle) * sinc, -torch.cos(middle) * sinc

    def to_velocity(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """v(x, t) = da/ds(t, t) x + db/ds(t, t) N from the network's output N(x, t, t)."""
        if self.coefficients == "euler":
            return output
        da, db = self.velocity_coefficients(t)
        return per_sample(da, x) * x + per_sample(db, x) * output

    def to_solution(self, output: Tensor, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """f(x, t, s) = a(t, s) x + b(t, s) N from the network's output N(x, t, s)."""
        a, b = self.solution_coefficients(t, s)
        return per_sample(a, x) * x + per_sample(b, x) * output

    def velocity(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """v(x, t; y), the velocity of the ODE, [B, C, H, W]; y [B] labels, None: the null label."""
        return self.to_velocity(self.network(x, t, t, y), x, t)

    def solution(self, x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        """f(x, t, s; y), the state at time s <= t, [B, C, H, W]; f(x, t, t) = x."""
        return self.to_solution(self.network(x, t, s, y), x, t, s)

    def forward(self, x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        """The same as `solution`."""
        return self.solution(x, t, s, y)
