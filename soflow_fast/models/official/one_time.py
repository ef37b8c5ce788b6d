"""DiT and SiT checkpoints (arXiv 2212.09748, 2401.08740) as the weights that a SoFlow network begins with.

Their network sees one time. The second time embedder begins with a last layer of zeros, so that N(x, t, s) is at first
the same for all s, and that layer has a gradient at once. Networks that also learn a variance give twice the channels,
of which the first half is kept.

SiT counts time from noise at 0 to data at 1, and its velocity points that way. With u = 1 - t the sinusoids of u are
combinations of those of t, cos(u w) = cos w cos(t w) + sin w sin(t w) and sin(u w) = sin w cos(t w) - cos w sin(t w),
so the first layer of its time embedder is turned accordingly, and the last layer of the network changes its sign:
N(x, t, s) is then minus its output at 1 - t, to rounding, and v(x, t) that velocity in our direction.

DiT predicts the noise at steps 0 to 999 of a diffusion. Its weights are taken as they are: a start, no flow yet.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from ...config.schema import DiTConfig
from ...errors import CheckpointError
from ...flow import SolutionFlow
from ..dit import FREQUENCIES, sinusoids

Kind = Literal["dit", "sit"]
W_EMBEDDER = "w_embedder.mlp.0.weight"
"""A tensor that a network for a range of guidance scales has."""


def is_one_time(weights: Mapping[str, Tensor]) -> bool:
    """Whether a network, by its weights' names, sees one time only."""
    return "t_embedder.mlp.0.weight" in weights and not any(name.startswith("s_embedder.") for name in weights)


def with_two_times(
    weights: Mapping[str, Tensor], kind: Kind, flow: SolutionFlow, initial: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
    """Weights for `flow.network`, by their names in it, of a DiT's or SiT's.

    initial: the weights with which the network would begin, for the second time embedder. Raises CheckpointError if
    the output is neither of the network's channels nor of twice as many.
    """
    config: DiTConfig = flow.network.config
    out = {**weights, **silent_embedder("s_embedder", initial)}
    sign = 1.0
    if kind == "sit":
        out["t_embedder.mlp.0.weight"] = of_the_rest(weights["t_embedder.mlp.0.weight"])
        sign = -1 / flow.velocity_slope
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        value, expected = weights.get(name), initial[name]
        if value is None or value.numel() not in (expected.numel(), 2 * expected.numel()):
            found = "missing" if value is None else list(value.shape)
            raise CheckpointError(f"{where}: {name} is {found}, the model's is {list(expected.shape)}, or twice that")
        kept = value.view(config.patch_size**2, -1, *value.shape[1:])[:, : config.in_channels]  # [p^2, C, ...]
        out[name] = sign * kept.reshape(expected.shape).float()
    return out


def silent_embedder(name: str, initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a time embedder that is new to a network: the output is at first what it was without it.

    initial: the weights with which a network would begin, by the names in it.
    """
    first, last = ([f"{name}.mlp.{layer}.{part}" for part in ("weight", "bias")] for layer in (0, 2))
    return {key: initial[key] for key in first} | {key: torch.zeros_like(initial[key]) for key in last}


def of_the_rest(weight: Tensor) -> Tensor:
    """The first layer [D, 256] of a time embedder such that it gives at t what `weight` gives at 1 - t."""
    of_one = sinusoids(torch.ones(1, dtype=torch.float64))[0]
    cos, sin = of_one.split(FREQUENCIES // 2)
    by_cos, by_sin = weight.double().split(FREQUENCIES // 2, dim=1)
    return torch.cat([by_cos * cos + by_sin * sin, by_cos * sin - by_sin * cos], dim=1).float()
