"""The residual MLP of an action policy: the mean velocity of a chunk of actions between two times."""

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..config.schema import PolicyConfig
from ..config.validation import validate_model

MAX_PERIOD = 10_000.0


def recommended_defaults() -> dict[str, int]:
    """Sizes that a policy is usually built with, as keywords of `SoFlowPolicy`: all but `obs_size`, which the task
    gives. No time is in them: the noise is at t = 0 and the action at t = 1 with any of them (`NOISE_AT_ZERO`)."""
    return {"action_dim": 64, "action_horizon": 8, "hidden_size": 256, "num_layers": 4}


def output_size(**options: int) -> int:
    """The numbers that a policy gives for one observation: `action_horizon * action_dim` of the options, what is not
    among them being of `recommended_defaults`. They are an action at t = 1, or noise at t = 0 (`NOISE_AT_ZERO`).

    Other options of `SoFlowPolicy` change nothing. Raises ValueError for an option that it does not have.
    """
    for name in options:
        if name not in ("obs_size", *recommended_defaults()):
            raise ValueError(f"{name}: no option of SoFlowPolicy")
        if type(options[name]) is not int or options[name] < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {options[name]!r}")
    chosen = recommended_defaults() | options
    return chosen["action_horizon"] * chosen["action_dim"]


def sinusoids(t: Tensor, size: int) -> Tensor:
    """[sin, cos] of times [B] at size / 2 frequencies, from 1 falling towards 1 / 10000: [B, size]. 0 is noise and 1 is
    the action (`NOISE_AT_ZERO`); they are not scaled."""
    half = size // 2
    frequencies = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, device=t.device, dtype=t.dtype) / half)
    angles = t[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1)


class ResidualBlock(nn.Module):
    """h + SiLU(Linear(SiLU(Linear(h)))), [B, hidden_size]."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, h: Tensor) -> Tensor:
        return h + nn.functional.silu(self.fc2(nn.functional.silu(self.fc1(h))))


class SoFlowPolicy(nn.Module):
    """F(x_t, t, s, observations), the mean velocity of a chunk of actions on the way from time t to time s >= t.

    Time runs from the noise, t = 0, to the action, t = 1 (`NOISE_AT_ZERO`), the other way than in the rest of this
    package. `euler_parameterize` makes of F the state at s; one call at (0, 1) goes from noise to an action.

    The hidden state is the sum of linear embeddings of the observations and of the flattened x_t, and of sinusoids of t
    and of s ([sin, cos], half of the size each, longest period 10000). Residual blocks and a linear output follow.
    """

    def __init__(
        self,
        obs_size: int,
        action_dim: int,
        action_horizon: int = 8,
        hidden_size: int = 256,
        num_layers: int = 4,
    ) -> None:
        """obs_size: numbers in an observation. action_dim: in an action. action_horizon: actions in a chunk, which is
        noise at t = 0 (`NOISE_AT_ZERO`). Raises ValueError naming a size that is not a whole number above 0, or a
        `hidden_size` that is odd."""
        super().__init__()
        self.config = PolicyConfig(obs_size, action_dim, action_horizon, hidden_size, num_layers, executed=1)
        validate_model(self.config)
        for name in ("obs_size", "action_dim"):
            if not getattr(self.config, name):
                raise ValueError(f"{name} must be at least 1, got 0")
        numbers = action_horizon * action_dim
        self.obs_embedder = nn.Linear(obs_size, hidden_size)
        self.x_embedder = nn.Linear(numbers, hidden_size)
        self.blocks = nn.ModuleList(ResidualBlock(hidden_size) for _ in range(num_layers))
        self.output = nn.Linear(hidden_size, numbers)
        self.initialize()

    @torch.no_grad()
    def initialize(self, source: torch.Generator | None = None, whole: Any = nullcontext) -> None:
        """Xavier uniform weights and zero biases, the output all zero: at first F is 0, so every action at t = 1 is the
        noise at t = 0 (`NOISE_AT_ZERO`). Nothing on the meta device.

        whole: gives what is drawn into for a parameter, where that is only a part of one.
        """
        if self.output.weight.device.type == "meta":
            return
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                with whole(layer.weight) as weight:
                    nn.init.xavier_uniform_(weight, generator=source)
                nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.output.weight)

    def forward(self, x_t: Tensor, t: Tensor, s: Tensor, observations: Tensor) -> Tensor:
        """F, [B, horizon, dim]; x_t: [B, horizon, dim], noise at t = 0 and an action at t = 1 (`NOISE_AT_ZERO`); t, s:
        [B] in [0, 1]; observations: [B, obs_size]. All floating, of the dtype of the parameters.

        Raises ValueError for a shape or dtype that does not fit.
        """
        self._check(x_t, t, s, observations)
        h = self.obs_embedder(observations) + self.x_embedder(x_t.flatten(1))
        size = self.config.hidden_size
        h = h + sinusoids(t, size) + sinusoids(s, size)
        for block in self.blocks:
            h = block(h)
        return self.output(h).reshape(x_t.shape)

    def _check(self, x_t: Tensor, t: Tensor, s: Tensor, observations: Tensor) -> None:
        chunk, seen = [self.config.action_horizon, self.config.action_dim], self.config.obs_size
        if not x_t.is_floating_point() or list(x_t.shape[1:]) != chunk or not len(x_t):
            wanted = f"floating [B, {chunk[0]}, {chunk[1]}] with B >= 1"
            raise ValueError(f"x_t must be {wanted}, got {x_t.dtype} {list(x_t.shape)}")
        shapes = {"t": (t, [len(x_t)]), "s": (s, [len(x_t)]), "observations": (observations, [len(x_t), seen])}
        for name, (value, shape) in shapes.items():
            if not value.is_floating_point() or list(value.shape) != shape:
                raise ValueError(f"{name} must be floating {shape}, got {value.dtype} {list(value.shape)}")
        dtype = self.output.weight.dtype
        for name, value in (("x_t", x_t), ("t", t), ("s", s), ("observations", observations)):
            if value.dtype != dtype and not torch.is_autocast_enabled(x_t.device.type):
                raise ValueError(f"{name} must be {dtype} like the parameters, got {value.dtype}")
