"""The linear layers of the blocks in float8, by torchao's training recipe: tensor-wise dynamic scales, e4m3 values and
weights, e5m2 gradients (Micikevicius et al. 2022, arXiv 2209.05433). For Hopper, Ada and later; the rest stays bf16."""

import importlib.util

import torch

from ..config.schema import DiTConfig
from ..errors import ConfigError
from .dit import DiT

MULTIPLE = 16
"""The sides of a float8 product are multiples of this."""


def require(model: DiTConfig, device: torch.device, flag: str = "--precision") -> None:
    """Raise ConfigError where fp8, which a flag asks for, cannot be had."""
    tokens = (model.input_size // model.patch_size) ** 2
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(f"{flag} fp8: torchao is not installed (pip install torchao)")
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError(f"{flag} fp8: needs an NVIDIA GPU of compute capability 8.9 or more")
    for name, value in (("model.hidden_size", model.hidden_size), ("tokens", tokens)):
        if value % MULTIPLE:
            raise ConfigError(f"{flag} fp8: {name} must be a multiple of {MULTIPLE}, got {value}")


def use_float8(net: DiT, *, emulate: bool = False) -> None:
    """Replace the blocks' linear layers on tokens by torchao's, with the same parameters and names."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # pyright: ignore[reportMissingImports]

    layers = {id(layer) for block in net.blocks for layer in block.linears()}
    convert_to_float8_training(
        net, config=Float8LinearConfig(emulate=emulate), module_filter_fn=lambda layer, name: id(layer) in layers
    )


def float8_twin(net: DiT) -> DiT:
    """A network with the very parameters of `net`, whose blocks multiply in float8: for forwards without gradient."""
    with torch.device("meta"):
        twin = DiT(net.config)
    twin.load_state_dict(net.state_dict(keep_vars=True), assign=True)
    use_float8(twin)
    return twin.eval()


def is_twin(twin: DiT, net: DiT) -> bool:
    """Whether the parameters of a `float8_twin` are still those of `net`."""
    return all(a is b for a, b in zip(twin.parameters(), net.parameters(), strict=True))
