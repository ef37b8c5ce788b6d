"""A small DiT with inputs and gradients, for the tests of networks."""

import dataclasses

import torch

from soflow_fast import DiTConfig
from soflow_fast.models.dit import DiT
from soflow_fast.training.precision import round_parameters

SIZES = DiTConfig(input_size=8, patch_size=2, in_channels=2, hidden_size=40, depth=3, num_heads=2, num_classes=5)


def network(dtype=torch.float32, rounded=None, qk_norm=False, **attributes):
    """A DiT off its initial zeros, where half of the gradients vanish. rounded: the dtype of the blocks' parameters."""
    net = DiT(dataclasses.replace(SIZES, qk_norm=qk_norm))
    net.keep_norms = False
    net.initialize(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    net.to(dtype)  # not before, as float64 draws other numbers
    if rounded is not None:
        round_parameters(net, net.low_precision_layers(), rounded)
    for name, value in attributes.items():
        setattr(net, name, value)
    return net


def inputs(B=4, dtype=torch.float32):
    source = torch.Generator().manual_seed(1)
    x, direction = (torch.randn(B, 2, 8, 8, generator=source).to(dtype) for _ in range(2))
    t = torch.rand(B, generator=source).to(dtype)
    return x, t, 0.5 * t, torch.randint(6, (B,), generator=source), direction


def gradients(net, B=4, autocast=False, **named):
    *given, direction = inputs(B, net.pos_embed.dtype)
    given[0].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = net(*given, **named)
    (out * direction).sum().backward()
    return {"output": out.detach(), "x": given[0].grad} | {name: p.grad for name, p in net.named_parameters()}


def assert_close(got, wanted, bound):
    for name, value in wanted.items():
        assert (got[name].double() - value.double()).norm() <= bound * value.double().norm(), name
