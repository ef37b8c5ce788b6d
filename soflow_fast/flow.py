"""The path from data to noise, and the solution function on top of a network (arXiv 2512.15657).

Time t is in [0, 1]: t = 0 is data, t = 1 is noise. Times have shape [B]; images [B, C, H, W].
"""

import math
import os
from typing import Any

import torch
from torch import Tensor, nn

from soflow_kernels import path_point

from .config.schema import Coefficients, FlowConfig, FlowPath, ObjectiveConfig, ObjectiveKind
from .config.validation import validate_flow, validate_objective

HALF_PI = math.pi / 2


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1], so that it multiplies `like`, in its dtype."""
    return value.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))


def conditions(y: Tensor | None, w: Tensor | None) -> tuple[Tensor | None, ...]:
    """The last arguments of a network: labels [B] or vectors [B, E], and guidance scales [B] where it takes them."""
    return (y,) if w is None else (y, w)


def seen_in_training(augmentation: Tensor | None, dropout: Tensor | None) -> dict[str, Tensor]:
    """The named arguments of a network that takes them in training: the labels of the augmentation [B, 9], and the
    seeds of the dropout [B]."""
    given = {"augmentation": augmentation, "dropout": dropout}
    return {name: value for name, value in given.items() if value is not None}


def null_like(network: Any, y: Tensor) -> Tensor:
    """No condition for each of y: the null label for labels [B], and for vectors [B, E], floating, rows of NaN, which a
    network takes for its null vector. No other number could not be part of a vector."""
    return torch.full_like(y, math.nan if y.is_floating_point() else network.num_classes)


def is_null(network: Any, y: Tensor) -> Tensor:
    """Which samples of labels [B] or vectors [B, E] have no condition, bool [B]."""
    return y.isnan().all(1) if y.is_floating_point() else y == network.num_classes


class SolutionFlow(nn.Module):
    """f(x, t, s) = a(t, s) x + b(t, s) N(x, t, s): the state at time s of the velocity ODE through x at time t.

    | path | alpha(t), beta(t) |    | coefficients | a(t, s), b(t, s) |
    |---|---|---|---|---|
    | "linear" | 1 - t, t |    | "euler" | 1, s - t |
    | "trig" | cos(pi t / 2), sin(pi t / 2) |    | "trig" | cos(pi/2 (s - t)), sin(pi/2 (s - t)) |

    `network` is any module with the call `network(x, t, s, y)` and, where y are labels, the attribute `num_classes`,
    the null label; where they are vectors [B, E], floating, it takes a row of NaN for its null vector. One that was
    trained for a range of guidance scales takes these too, `network(x, t, s, y, w)`, w [B].
    Its parameters' names are `network.` and the network's own, as in the public checkpoints.
    """

    network: Any
    origin: Any = None
    """The training that the weights are of, as `load` has found it (`runs.checkpoint.origin`); None: not known."""

    def __init__(
        self,
        network: nn.Module,
        path: FlowPath = "linear",
        coefficients: Coefficients = "euler",
        objective: ObjectiveKind = "soflow",
    ) -> None:
        """`network(x, t, s, y)` gives N, of the shape of x. objective: that it is trained by, which decides how samples
        are drawn unless that is said. Raises ValueError for an unknown path, coefficients or objective."""
        super().__init__()
        validate_flow(FlowConfig(path, coefficients))
        validate_objective(ObjectiveConfig(kind=objective), "objective.")
        self.network = network
        self.path = path
        self.coefficients = coefficients
        self.objective = objective

    @property
    def solves(self) -> bool:
        """Whether the network has learned solutions, so that one call goes from noise to data; else the velocity."""
        return self.objective != "flow-matching"

    def point(self, x0: Tensor, x1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_t = alpha x_0 + beta x_1, and its velocity v_t = alpha' x_0 + beta' x_1, both [B, C, H, W]."""
        return path_point(x0, x1, t, path=self.path)

    def solution_coefficients(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """a(t, s) and b(t, s), [B]."""
        if self.coefficients == "euler":
            return torch.ones_like(t), s - t
        angle = HALF_PI * (s - t)
        return torch.cos(angle), torch.sin(angle)

    @property
    def velocity_slope(self) -> float:
        """db/ds(t, t), the same for every t: the velocity is this times N(x, t, t), as da/ds(t, t) is 0."""
        return 1.0 if self.coefficients == "euler" else HALF_PI

    def to_velocity(self, output: Tensor) -> Tensor:
        """v(x, t) from the network's output N(x, t, t)."""
        return output if self.velocity_slope == 1 else self.velocity_slope * output

    def to_solution(self, output: Tensor, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """f(x, t, s) = a(t, s) x + b(t, s) N from the network's output N(x, t, s)."""
        a, b = self.solution_coefficients(t, s)
        return per_sample(a, x) * x + per_sample(b, x) * output

    def velocity(self, x: Tensor, t: Tensor, y: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        """v(x, t; y), the velocity of the ODE, [B, C, H, W]; y [B] labels or [B, E] vectors, None: the null one; w [B]
        guidance scales of a network that takes them."""
        return self.to_velocity(self.network(x, t, t, *conditions(y, w)))

    def solution(self, x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        """f(x, t, s; y), the state at time s <= t, [B, C, H, W]; f(x, t, t) = x. y, w: as for `velocity`."""
        return self.to_solution(self.network(x, t, s, *conditions(y, w)), x, t, s)

    def forward(self, x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        """The step from t to s: `solution`, or Euler's along the velocity of a flow that has learned that alone."""
        if self.solves:
            return self.solution(x, t, s, y, w)
        return x + per_sample(s - t, x) * self.velocity(x, t, y, w)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write config.json, model.safetensors and a model card to a folder (`hub.save_pretrained`)."""
        _package().save_pretrained(self, folder)

    def push_to_hub(self, repo_id: str, **settings: Any) -> Any:
        """Upload the same to a repository of the Hugging Face hub (`hub.push_to_hub`)."""
        return _package().push_to_hub(self, repo_id, **settings)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, **settings: Any) -> "SolutionFlow":
        """A flow from a folder, or from a repository of the hub by its name (`hub.from_pretrained`)."""
        return _package().from_pretrained(source, **settings)


def _package() -> Any:
    """The package, which finds its public functions where they live. The methods above are short forms of some of them,
    for users: nothing in this package calls them, so what those import does not stand behind this module."""
    import soflow_fast

    return soflow_fast
