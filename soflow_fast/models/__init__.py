"""The networks, and their forwards: plain, fused, paired."""

from typing import Any

from ..config.schema import ModelConfig, PolicyConfig, UNetConfig


def network_of(config: ModelConfig) -> Any:
    """The network of a configuration, `dit.DiT`, `unet.UNet` or `policy.PolicyNetwork`. Raises ValueError for a wrong
    one, and ConfigError for a U-Net without diffusers."""
    if isinstance(config, UNetConfig):
        from .unet import UNet

        return UNet(config)
    if isinstance(config, PolicyConfig):
        from ..policy.engine import PolicyNetwork

        return PolicyNetwork(config)
    from .dit import DiT

    return DiT(config)
