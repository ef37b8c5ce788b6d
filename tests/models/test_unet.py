"""The U-Net: its parts, what its dropout and its recomputation are functions of, its initial weights, its refusals."""

import math
import sys
from dataclasses import replace

import pytest
import torch

from soflow_fast.config.schema import UNetConfig
from soflow_fast.errors import ConfigError
from soflow_fast.models import network_of
from soflow_fast.models._seeded_dropout import SeededDropout
from soflow_fast.models.unet import UNet
from tests import song_unet
from tests.unets import roughened

SMALL = UNetConfig(input_size=8, channels=16, multipliers=(1, 2), blocks=1, attention_sizes=(4,), dropout=0.3)


def network(**changes):
    net = UNet(replace(SMALL, **changes))
    net.initialize(torch.Generator().manual_seed(0))
    return roughened(net)


def inputs(B=4):
    source = torch.Generator().manual_seed(1)
    t = torch.rand(B, generator=source)
    seeds = torch.randint(-(2**31), 2**31, (B,), generator=source, dtype=torch.int32)
    return torch.randn(B, 3, 8, 8, generator=source), t, 0.3 * t, seeds


def test_the_default_is_edms_network_for_cifar10():
    """As many numbers as a SongUNet of this shape has, which a layout written apart from it counts."""
    with torch.device("meta"):
        net = network_of(UNetConfig())
    layout = song_unet.random_weights(32, 128, (2, 2, 2), 4, (16,))
    wanted = sum(value.numel() for name, value in layout.items() if "resample_filter" not in name)
    assert isinstance(net, UNet) and sum(p.numel() for p in net.parameters()) == wanted
    assert [*net.enc][:3] == ["32x32_conv", "32x32_block0", "32x32_block1"]
    assert sum(block.attention is not None for block in net.unet_blocks()) == 4 + 1 + 1  # down, middle, up


def test_dropout_is_a_function_of_the_sample_alone():
    net, (x, t, s, seeds) = network(), inputs()
    plain, whole = net(x, t, s), net(x, t, s, dropout=seeds)
    assert torch.equal(whole, net.eval()(x, t, s, dropout=seeds))  # whatever the mode
    assert torch.equal(plain, net.train()(x, t, s))
    assert ((whole - plain).flatten(1).norm(dim=1) > 0.01 * plain.flatten(1).norm(dim=1)).all()
    torch.manual_seed(7)
    for part in (slice(0, 1), slice(1, 4)):
        alone = net(x[part], t[part], s[part], dropout=seeds[part])
        assert torch.allclose(alone, whole[part], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(net(x, t, s, dropout=seeds + 1), whole, rtol=1e-2, atol=1e-3)


def test_what_is_left_out_is_random_to_the_eye():
    """Shares, and correlations between samples, places and layers, as of independent draws: five deviations at most."""
    p, seeds, shape = 0.3, torch.arange(64, dtype=torch.int32), torch.Size([16, 16, 16])
    layer, other = SeededDropout(p), SeededDropout(p)
    other.number = 1
    found = [
        (each.kept(seeds, shape).double().flatten(1) - (1 - p)) / math.sqrt(p * (1 - p)) for each in (layer, other)
    ]
    n, m = found[0].numel(), found[0].shape[1]
    for values in found:
        assert abs(values.mean()) < 5 / math.sqrt(n)
        assert abs(values.mean(1)).max() < 5 / math.sqrt(m) and abs(values.mean(0)).max() < 5 / math.sqrt(64)
        for moved in (1, 16, 256):
            assert abs((values * values.roll(moved, 1)).mean()) < 5 / math.sqrt(n)
        assert abs((values[1:] * values[:-1]).mean()) < 5 / math.sqrt(n)
    assert abs((found[0] * found[1]).mean()) < 5 / math.sqrt(n)
    with layer.seeded(seeds):
        kept = layer(torch.ones(64, *shape))
    assert kept.unique().tolist() == [0.0, pytest.approx(1 / 0.7)]
    assert torch.equal(layer(kept), kept)  # without seeds nothing


def test_recomputing_blocks_gives_the_same_gradients():
    x, t, s, seeds = inputs()
    found = {}
    for recompute in ("none", "block"):
        net = network()
        net.recompute = recompute
        net(x, t, s, dropout=seeds, augmentation=torch.ones(4, 9)).square().sum().backward()
        found[recompute] = [p.grad for p in net.parameters()]
    assert all(map(torch.equal, found["none"], found["block"]))


def test_every_parameter_has_a_gradient_without_augmentation():
    net, (x, t, s, _) = network(), inputs()
    seen = []
    net.watch_gradient = seen.append
    net(x, t, s).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    assert not net.t_embedder.cond_proj.weight.grad.any() and len(seen) == 1 and seen[0].any()


def test_autocast_leaves_the_ends_in_float32():
    net, (x, t, s, seeds) = network(), inputs()
    wanted = net(x, t, s, dropout=seeds)
    with torch.autocast("cpu", torch.bfloat16):
        got = net(x, t, s, dropout=seeds)
    assert got.dtype == torch.float32
    assert (
        1e-4 < float((got - wanted).detach().norm() / wanted.detach().norm()) < 0.05
    )  # a rounding of 2^-9 in each of 30 layers


def test_float64_is_float64():
    net, (x, t, s, seeds) = network().double(), inputs()
    x, t, s = x.double(), t.double(), s.double()
    step = 1e-6
    got = (net(x, t + step, s, dropout=seeds) - net(x, t, s, dropout=seeds)) / step
    wider = (net(x, t + 2 * step, s, dropout=seeds) - net(x, t, s, dropout=seeds)) / (2 * step)
    assert net(x, t, s).dtype == torch.float64
    error = float((got - wider).detach().norm() / got.detach().norm())
    assert error < 1e-4  # of float32 anywhere in it, 2^-24 / 1e-6


def test_initial_weights_are_a_function_of_the_generator():
    one, other = (UNet(SMALL) for _ in range(2))
    for net in (one, other):
        net.initialize(torch.Generator().manual_seed(3))
    assert all(map(torch.equal, one.parameters(), other.parameters()))
    for name, p in one.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif p.dim() == 1:
            assert (p == 1).all(), name
        else:
            bound = math.sqrt(6 / (p[0].numel() + p[:, 0].numel()))
            size = 1e-5 if "conv2" in name or "to_out" in name or "aux_conv" in name else 1.0
            size = math.sqrt(0.2) if any(part in name for part in ("to_q", "to_k", "to_v")) else size
            assert 0.8 < float(p.detach().abs().max()) / (size * bound) <= 1, name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"x": torch.zeros(4, 3, 4, 4)}, r"x must be \[B, 3, 8, 8\]"),
        ({"t": torch.zeros(3)}, r"t must be \[4\]"),
        ({"dropout": torch.zeros(3, dtype=torch.int32)}, r"dropout must be \[4\]"),
        ({"augmentation": torch.zeros(4, 8)}, r"augmentation must be \[4, 9\]"),
    ],
)
def test_wrong_inputs_are_named(changes, said):
    x, t, s, _ = inputs()
    with pytest.raises(ValueError, match=said):
        network()(**{"x": x, "t": t, "s": s, **changes})


def test_a_network_without_labels_takes_none():
    x, t, s, _ = inputs()
    net = network(augmentation_labels=False)
    assert net.t_embedder.cond_proj is None
    with pytest.raises(ValueError, match="augmentation must be left out"):
        net(x, t, s, augmentation=torch.zeros(4, 9))


def test_without_diffusers_it_is_one_line(monkeypatch):
    for name in ("resnet", "embeddings", "attention_processor"):
        monkeypatch.setitem(sys.modules, f"diffusers.models.{name}", None)
    with pytest.raises(ConfigError, match="diffusers, which is not installed: pip install"):
        UNet(SMALL)
