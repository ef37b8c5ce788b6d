"""Action policies of a small size, for tests."""

import torch

from soflow_fast.policy import SoFlowPolicy
from soflow_fast.rng import generator

SIZES = {"obs_size": 5, "action_dim": 3, "action_horizon": 4, "hidden_size": 16, "num_layers": 2}


def policy(dtype: torch.dtype = torch.float64, **sizes: int) -> SoFlowPolicy:
    """A policy whose weights are all random, so that no part of it is silent."""
    net = SoFlowPolicy(**(SIZES | sizes)).to(dtype)
    source = generator(0, 0, 0, "weights")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=source, dtype=dtype) / 4)
    return net
