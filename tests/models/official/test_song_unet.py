"""The authors' U-Net: a network of its public layout, written in the tests, loads into ours and computes the same."""

from dataclasses import replace

import pytest
import torch

from soflow_fast import load_official
from soflow_fast.config.schema import DiTConfig, UNetConfig
from soflow_fast.errors import CheckpointError
from tests import song_unet

SMALL = UNetConfig(input_size=8, channels=16, multipliers=(1, 2), blocks=1, attention_sizes=(4,))


def inputs(B=3):
    source = torch.Generator().manual_seed(1)
    x, labels = torch.randn(B, 3, 8, 8, generator=source), torch.randn(B, 9, generator=source)
    t = torch.rand(B, generator=source)
    return x, t, 0.3 * t, labels


@pytest.mark.parametrize(
    ("layout", "config"),
    [
        ({}, {}),
        ({"multipliers": (2, 1, 2), "blocks": 2, "attention": (8, 2)}, {"attention_sizes": (8, 2)}),
        ({"labels": 0, "attention": (), "colours": 1}, {"attention_sizes": (0,)}),
        ({"C": 32, "multipliers": (1, 4)}, {}),  # norms of 32 groups beside such of fewer
    ],
)
def test_their_network_computes_the_same_here(layout, config):
    weights = song_unet.random_weights(**layout)
    flow = load_official({f"network.{name}": value for name, value in weights.items()})
    levels, blocks = len(layout.get("multipliers", (1, 2))), layout.get("blocks", 1)
    assert flow.network.config == UNetConfig(
        input_size=8,
        in_channels=layout.get("colours", 3),
        channels=layout.get("C", 16),
        multipliers=layout.get("multipliers", (1, 2)),
        blocks=blocks,
        augmentation_labels=layout.get("labels", 9) > 0,
        **{"attention_sizes": (4,), **config},
    )
    x, t, s, labels = inputs()
    x = x[:, : layout.get("colours", 3)]
    for given in (None, labels) if layout.get("labels", 9) else (None,):
        wanted = song_unet.forward(weights, x, t, t - s, given, blocks=blocks, levels=levels)
        got = flow.network(x, t, s, augmentation=given)
        assert (got - wanted).norm() < 1e-5 * wanted.norm()


def test_a_file_of_theirs_gives_the_average(tmp_path):
    plain, average = song_unet.random_weights(), song_unet.random_weights()
    average["map_layer0.bias"] = average["map_layer0.bias"] + 1
    content = {
        "model": {f"module.network.{name}": value for name, value in plain.items()},
        "ema_model": {f"network.{name}": value for name, value in average.items()},
        "finished_steps": 3,
    }
    torch.save(content, tmp_path / "3.pt")
    flow = load_official(tmp_path / "3.pt", replace(SMALL, dropout=0.1))
    assert flow.network.config.dropout == 0.1 and not flow.training
    assert torch.equal(flow.network.t_embedder.linear_1.bias, average["map_layer0.bias"])


def without(*endings):
    return lambda w: {name: value for name, value in w.items() if not name.endswith(endings)}


WRONG = {
    "one time": (without("_s.weight", "_s.bias"), "sees one time"),
    "two times at once": (
        lambda w: w | {"map_layer0.weight": torch.zeros(64, 32)},
        r"map_layer0.weight takes both times at once \(32 numbers\)",
    ),
    "a third embedding": (
        lambda w: w | {"map_layer0_r.weight": torch.zeros(64, 16)},
        r"map_layer0_r.weight \[64, 16\] has no place",
    ),
    "an embedding of another width": (
        lambda w: w | {"map_layer0_s.weight": torch.zeros(64, 8)},
        r"map_layer0_s.weight \[64, 8\] has no place",
    ),
    "labels": (lambda w: w | {"map_label.weight": torch.zeros(16, 10)}, "map_label.weight: its network has labels"),
    "other labels of the augmentation": (
        lambda w: w | {"map_augment.weight": torch.zeros(16, 6)},
        r"map_augment.weight is \[16, 6\], the model's sees 9 labels",
    ),
    "another filter": (
        lambda w: w | {"enc.4x4_down.conv0.resample_filter": torch.ones(1, 1, 4, 4) / 16},
        "enc.4x4_down.conv0.resample_filter is another filter",
    ),
    "NCSN++": (lambda w: w | {"enc.4x4_aux_residual.weight": torch.zeros(16, 3, 3, 3)}, "enc.4x4_aux_residual"),
    "a missing layer": (without("dec.4x4_in1.conv1.bias"), "network.dec.4x4_in1.resnet.conv2.bias is missing"),
    "an unknown layer": (
        lambda w: w | {"enc.4x4_block0.conv7.weight": torch.zeros(1)},
        "enc.4x4_block0.conv7.weight has no place",
    ),
    "a shape": (
        lambda w: w | {"enc.4x4_block0.affine.bias": torch.zeros(5)},
        r"enc.4x4_block0.resnet.time_emb_proj.bias is \[5\], the model's is \[32\]",
    ),
    "a width that no U-Net here has": (
        lambda w: song_unet.random_weights(C=4),
        "channels must be a multiple of 8, got 4",
    ),
    "a number for a matrix": (lambda w: w | {"map_layer0.weight": torch.zeros(())}, "map_layer0|t_embedder"),
    "no levels": (lambda w: {"map_layer0.weight": w["map_layer0.weight"]}, "not the weights of a DDPM"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_one_line(what):
    change, said = WRONG[what]
    with pytest.raises(CheckpointError, match=said) as error:
        load_official({f"network.{name}": value for name, value in change(song_unet.random_weights()).items()})
    assert "\n" not in str(error.value)


def test_a_configuration_that_contradicts_is_named():
    weights = song_unet.random_weights()
    for config, said in (
        (replace(SMALL, blocks=2), "blocks is 1 in its network, the configuration says 2"),
        (replace(SMALL, attention_sizes=(8,)), r"attention_sizes is \(4,\)"),
        (DiTConfig(), "holds a U-Net, the configuration is a DiT's"),
    ):
        with pytest.raises(CheckpointError, match=said):
            load_official(weights, config)
    with pytest.raises(CheckpointError, match="no classes"):
        load_official(weights, num_classes=10)
