"""A policy as the engine calls its networks: data at t = 0, noise at t = 1, samples [B, 1, horizon, action_dim]."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..config.schema import PolicyConfig
from .network import SoFlowPolicy


class PolicyNetwork(nn.Module):
    """N(x, t, s, y) = -F(x, 1 - t, 1 - s, y) of a `SoFlowPolicy` F, y being observations [B, obs_size].

    F has the noise at t = 0 and the action at t = 1 (`NOISE_AT_ZERO`), the engine the other way round: its velocity is
    noise - action, and its solution x + (s - t) N is the policy's x + ((1 - s) - (1 - t)) F.
    """

    num_classes = 0
    attention_backend = "none"
    recompute = "none"
    keep_norms: bool | None = None
    mlp = "kernels"
    watch_gradient: Callable[[Tensor], None] | None = None
    """Is given the gradient of the hidden state, as by `DiT`."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        sizes = config.obs_size, config.action_dim, config.action_horizon, config.hidden_size, config.num_layers
        self.config = config
        self.policy = SoFlowPolicy(*sizes)

    def initialize(self, source: torch.Generator | None = None, **whole: Any) -> None:
        """See `SoFlowPolicy.initialize`."""
        self.policy.initialize(source, **whole)

    @property
    def input_dtype(self) -> torch.dtype:
        """The dtype in which chunks are taken."""
        return self.policy.output.weight.dtype

    def low_precision_layers(self) -> list[nn.Module]:
        """The layers whose parameters a step in bf16 rounds: none, as they are small; autocast rounds its operands."""
        return []

    def set_attention(self, backend: Any) -> None:
        """Nothing: there is no attention."""

    def forward(self, x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        """N, [B, 1, horizon, dim]; x: the same, an action at t = 0 and noise at t = 1; t, s: [B]; y: [B, obs_size].

        Raises ValueError without observations and for shapes that do not fit.
        """
        if y is None:
            raise ValueError("y: a policy takes observations [B, obs_size], got none")
        out = self.policy(x[:, 0], 1 - t.to(x.dtype), 1 - s.to(x.dtype), y.to(x.dtype))
        if self.watch_gradient is not None and out.requires_grad:
            out.register_hook(self.watch_gradient)
        return -out[:, None]
