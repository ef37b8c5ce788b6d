"""The DiT: sizes, initialisation, keys, shapes, dtypes."""

import math

import pytest
import torch

from soflow_fast import DiT, DiTConfig, SolutionFlow
from soflow_fast.config.schema import DIT_SIZES
from soflow_fast.models.dit import sincos_positions

TINY = DiTConfig(input_size=4, patch_size=2, in_channels=2, hidden_size=16, depth=2, num_heads=2, num_classes=3)


@pytest.mark.parametrize("name", DIT_SIZES)
def test_public_sizes(name):
    depth, hidden, heads, patch = DIT_SIZES[name]
    config = DiTConfig.named(f"DiT-{name}")
    assert config == DiTConfig.named(name)
    with torch.device("meta"):
        net = DiT(config)
    # 12 D^2 + 13 D of a block's products and biases, 6 D^2 + 6 D of its modulation
    blocks = depth * (18 * hidden**2 + 15 * hidden)
    embed = 4 * patch**2 * hidden + hidden + 1001 * hidden + 2 * (256 * hidden + hidden + hidden**2 + hidden)
    last = 2 * hidden**2 + 2 * hidden + (hidden + 1) * 4 * patch**2
    assert sum(p.numel() for p in net.parameters()) == blocks + embed + last
    assert net.blocks[0].attn.num_heads == heads


def test_unknown_size_names_the_nearest():
    with pytest.raises(ValueError, match="XL/2"):
        DiTConfig.named("XXL/2")


@pytest.mark.parametrize(
    "field,value",
    [("patch_size", 3), ("num_heads", 3), ("hidden_size", 0), ("depth", -1), ("hidden_size", 18), ("mlp_ratio", 0.0)],
)
def test_wrong_shapes_are_refused_by_name(field, value):
    import dataclasses

    with pytest.raises(ValueError, match=field if (field, value) != ("hidden_size", 18) else "hidden_size|num_heads"):
        DiT(dataclasses.replace(TINY, **{field: value}))


def test_initialisation():
    config = DiTConfig(
        input_size=8, patch_size=2, in_channels=4, hidden_size=192, depth=2, num_heads=4, num_classes=1000
    )
    net = DiT(config)
    linear = {name: m for name, m in net.named_modules() if isinstance(m, torch.nn.Linear)}
    assert all(m.bias.abs().max() == 0 for m in linear.values())
    for name, m in linear.items():
        std, fan = m.weight.std().item(), sum(m.weight.shape)
        if "adaLN" in name or name == "final_layer.linear":
            assert std == 0, name
        elif name.startswith("t_embedder"):
            assert std == pytest.approx(0.02, rel=0.05), name
        else:  # Xavier uniform on [-a, a], a = sqrt(6 / (in + out))
            assert std == pytest.approx((2 / fan) ** 0.5, rel=0.05), name
            assert m.weight.abs().max() <= (6 / fan) ** 0.5
    assert net.y_embedder.embedding_table.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert net.x_embedder.proj.weight.std().item() == pytest.approx((2 / (192 + 16)) ** 0.5, rel=0.05)
    x, t = torch.randn(2, 4, 8, 8), torch.rand(2)
    assert net(x, t, t, torch.tensor([0, 1])).abs().max() == 0


def test_label_free_input_is_the_null_label():
    torch.manual_seed(0)
    net = DiT(TINY)
    torch.nn.init.normal_(net.final_layer.linear.weight)
    torch.nn.init.normal_(net.final_layer.adaLN_modulation[1].weight)
    x, t = torch.randn(2, 2, 4, 4), torch.rand(2)
    assert torch.equal(net(x, t, t), net(x, t, t, torch.tensor([3, 3])))
    assert not torch.equal(net(x, t, t), net(x, t, t, torch.tensor([3, 2])))


def test_conditioning_sees_t_and_its_distance_to_s_unscaled():
    net = DiT(TINY).double()
    got = net.conditioning(torch.tensor([0.75]).double(), torch.tensor([0.25]).double(), None)

    def embedded(mlp, time):
        angle = time * torch.exp(-torch.arange(128).double() / 128 * math.log(10000))
        return mlp(torch.cat([angle.cos(), angle.sin()])[None])

    c = embedded(net.t_embedder.mlp, 0.75) + embedded(net.s_embedder.mlp, 0.5) + net.y_embedder(torch.tensor([-1]) % 4)
    torch.testing.assert_close(got, torch.nn.functional.silu(c))


def test_positions_tell_rows_from_columns():
    table = sincos_positions(8, 3)
    assert table.shape == (9, 8)
    assert torch.equal(table[0, :4], table[3, :4]) and not torch.equal(table[0, 4:], table[3, 4:])  # same column
    assert torch.equal(table[0, 4:], table[1, 4:]) and not torch.equal(table[0, :4], table[1, :4])  # same row
    assert len({tuple(row.tolist()) for row in table}) == 9


def test_patches_come_back_where_they_were():
    """With an identity embedding and output layer, unpatchify undoes patchify."""
    config = DiTConfig(input_size=4, patch_size=2, in_channels=3, hidden_size=12, depth=1, num_heads=1, num_classes=1)
    net = DiT(config)
    with torch.no_grad():
        net.x_embedder.proj.weight.copy_(torch.eye(12).reshape(12, 3, 2, 2))
    x = torch.randn(2, 3, 4, 4)
    tokens = (
        net.x_embedder(x).reshape(2, 4, 3, 2, 2).permute(0, 1, 3, 4, 2).reshape(2, 4, 12)
    )  # channel last in a patch
    assert torch.equal(net.unpatchify(tokens), x)
    torch.testing.assert_close(net.x_embedder(x), net.x_embedder.proj(x).flatten(2).transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_computes_in_the_dtype_of_its_weights(dtype):
    net = DiT(TINY).to(dtype)
    x = torch.randn(2, 2, 4, 4, dtype=dtype)
    assert net(x, torch.rand(2), torch.rand(2)).dtype == dtype


@pytest.mark.parametrize(
    "shapes,name",
    [(((2, 2, 4, 5), (2,), (2,)), "x"), (((2, 3, 4, 4), (2,), (2,)), "x"), (((2, 2, 4, 4), (1,), (2,)), "t"),
     (((2, 2, 4, 4), (2,), (2, 1)), "s")],
)  # fmt: skip
def test_wrong_inputs_are_refused_by_name(shapes, name):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        DiT(TINY)(*(torch.rand(shape) for shape in shapes))


def test_keys_are_the_public_ones():
    keys = set(SolutionFlow(DiT(TINY)).state_dict())
    block = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"]
    layers = ["x_embedder.proj", "final_layer.linear", "final_layer.adaLN_modulation.1"]
    layers += [f"{e}_embedder.mlp.{i}" for e in "ts" for i in (0, 2)] + [
        f"blocks.{i}.{b}" for i in range(2) for b in block
    ]
    wanted = {f"network.{name}.{part}" for name in layers for part in ("weight", "bias")}
    assert keys == wanted | {"network.pos_embed", "network.y_embedder.embedding_table.weight"}
