"""Whatever acts when a module is called, or in the place of a layer, takes effect or is refused by name."""

import types

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize, prune

from soflow_fast import paired_forward
from soflow_fast.models.dit import MLP, TapedOutputs
from tests.networks import SIZES, assert_close, gradients, inputs, network


def forward(net, dtype=None):
    *given, _ = inputs()
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not None):
        return net(*given)


def watch(net):
    """Hooks that change nothing: every module is called. Not on the convolution, which rounds in its own way."""
    for module in net.modules():
        if not isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("rounded", [None, torch.bfloat16], ids=["float32", "bf16 parameters"])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_called_modules_give_the_same_numbers(rounded, autocast):
    """To the bit where no kernel defers a bias, gradients included."""
    fused = gradients(network(rounded=rounded), autocast=autocast)
    net = network(rounded=rounded)
    watch(net)
    called = gradients(net, autocast=autocast)
    assert torch.equal(called["output"], fused["output"])
    assert_close(called, fused, 1e-2 if autocast else 1e-5)


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_forward_hooks_on_every_layer_are_seen(recompute):
    net = network(recompute=recompute)
    seen = set()
    for name, module in net.named_modules():
        module.register_forward_hook(lambda module, given, out, name=name: seen.add(name))
    gradients(net)
    assert seen == {name for name, module in net.named_modules() if not isinstance(module, nn.ModuleList)}


@pytest.mark.parametrize(
    "part", ["blocks.1.mlp.fc1", "blocks.0.attn", "t_embedder.mlp.0", "x_embedder.proj", "final_layer"]
)
def test_a_hook_that_changes_an_output_takes_effect(part):
    net = network()
    before = forward(net)
    handle = net.get_submodule(part).register_forward_hook(lambda module, given, out: out * 1.5)
    assert not torch.allclose(forward(net), before)
    handle.remove()
    assert torch.equal(forward(net), before)


def test_hooks_of_all_modules_are_seen():
    net, seen = network(), set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(module))
    try:
        out = forward(net)
    finally:
        handle.remove()
    assert seen == {module for module in net.modules() if not isinstance(module, nn.ModuleList)}
    assert torch.allclose(out, forward(net), atol=1e-5)


def test_backward_hooks_are_seen():
    net, seen = network(), []
    net.blocks[0].attn.register_full_backward_hook(lambda *_: seen.append("attn"))
    net.blocks[2].mlp.fc2.register_full_backward_pre_hook(lambda *_: seen.append("fc2"))
    gradients(net)
    assert seen == ["fc2", "attn"]


@pytest.mark.parametrize("target", ["qkv", "fc1", "adaLN_modulation.1", "mlp.2", "proj"])
def test_lora_takes_effect(target):
    """Adapters of the peft package: as the weight that they come to, and the only ones that get a gradient."""
    peft = pytest.importorskip("peft")
    net, merged = network(), network()
    target = "attn.proj" if target == "proj" else target
    adapted = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False))
    *given, direction = inputs()
    out = adapted(*given)
    (out * direction).sum().backward()
    got = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert got and all("lora_" in name for name in got)
    layers = {name: part for name, part in net.named_modules() if isinstance(part, peft.tuners.lora.Linear)}
    for name, part in layers.items():
        with torch.no_grad():
            merged.get_submodule(name).weight += part.get_delta_weight("default")
    assert torch.allclose(out, forward(merged), atol=1e-4) and not torch.allclose(out, forward(network()), atol=1e-2)


def test_pruning_takes_effect():
    net, cut = network(), network()
    prune.l1_unstructured(net.blocks[1].mlp.fc2, "weight", amount=0.7)
    with torch.no_grad():
        cut.blocks[1].mlp.fc2.weight *= net.blocks[1].mlp.fc2.weight_mask
    assert torch.equal(forward(net), forward(cut)) and not torch.equal(forward(net), forward(network()))


def test_parametrizations_take_effect():
    net, twice = network(), network()

    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(net.blocks[0].attn.proj, "weight", Double())
    with torch.no_grad():
        twice.blocks[0].attn.proj.weight *= 2
    assert torch.equal(forward(net), forward(twice))


def replaced_layer(net):
    net.blocks[2].attn.qkv = nn.Sequential(net.blocks[2].attn.qkv, nn.Identity())
    return "blocks.2.attn.qkv"


def replaced_forward(net):
    part = net.blocks[1].mlp
    part.forward = types.MethodType(lambda self, x: MLP.forward(self, x), part)
    return "blocks.1.mlp"


def appended_layer(net):
    net.s_embedder.mlp.append(nn.Identity())
    return "s_embedder.mlp"


def wrapped_block(net):
    net.blocks[0] = checkpoint_wrapper(net.blocks[0])
    return "blocks.0"


def without_bias(net):
    net.final_layer.linear.bias = None
    return "final_layer.linear"


@pytest.mark.parametrize("change", [replaced_layer, replaced_forward, appended_layer, wrapped_block, without_bias])
def test_what_does_the_same_gives_the_same_and_is_named(change):
    net, plain = network(), network()
    if change is without_bias:
        with torch.no_grad():
            plain.final_layer.linear.bias.zero_()
    name = change(net)
    assert net.changed_part() == name and plain.changed_part() is None
    assert torch.equal(forward(net), forward(plain))
    wanted, got = gradients(plain), gradients(net)
    assert torch.allclose(got["x"], wanted["x"], atol=1e-5)


def test_a_replaced_layer_takes_effect():
    net = network()
    before = forward(net)
    net.blocks[1].mlp.fc1 = nn.Linear(40, 160)  # plain, so that the fused path takes it
    assert net.changed_part() is None and not torch.allclose(forward(net), before)
    called = network()
    called.blocks[1].mlp.fc1 = net.blocks[1].mlp.fc1
    watch(called)
    assert torch.equal(forward(called), forward(net))


def test_a_class_with_another_forward_is_not_taken_for_plain(monkeypatch):
    net = network()
    before = forward(net)
    plain = MLP.forward
    monkeypatch.setattr(MLP, "forward", lambda self, x: 2 * plain(self, x))
    assert net.changed_part() == "blocks.0.mlp" and not torch.allclose(forward(net), before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["quantize_", "quantize_dynamic"])
def test_quantised_layers_take_effect(way):
    net = network()
    before = forward(net)
    if way == "quantize_":
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(net, quantization.Int8WeightOnlyConfig())
    else:
        net = torch.ao.quantization.quantize_dynamic(net, {nn.Linear})
    after = forward(net)
    assert net.changed_part() is not None
    assert 0 < (after - before).norm() < 0.1 * before.norm()
    if way == "quantize_":  # its layers take bf16 too
        assert (forward(net, torch.bfloat16) - before).norm() < 0.1 * before.norm()


@pytest.mark.parametrize("change", [replaced_layer, wrapped_block])
def test_increments_and_tapes_refuse_what_they_would_miss(change):
    net = network()
    name = change(net)
    x, t, s, y, dx = inputs()
    with pytest.raises(ValueError, match=rf"^net\.{name} was replaced, wrapped or hooked"):
        paired_forward(net, x, dx, t, 0 * t, s, y)
    with pytest.raises(ValueError, match=name), torch.no_grad():
        net(x, t, s, y, tape=TapedOutputs(slice(None)))


@pytest.mark.parametrize("called", [False, True])
def test_an_empty_batch_goes_through(called):
    net = network()
    if called:
        watch(net)
    x, t, s, y, _ = (value[:0] for value in inputs())
    out = net(x.requires_grad_(), t, s, y)
    assert out.shape == (0, SIZES.in_channels, SIZES.input_size, SIZES.input_size)
    out.sum().backward()
    assert all((p.grad == 0).all() for p in net.parameters() if p.grad is not None)


def test_parts_can_be_called_alone():
    net = network()
    x, t, s, y, _ = inputs()
    tokens = net.x_embedder(x) + net.pos_embed
    c = net.t_embedder(t) + net.s_embedder(t - s) + net.y_embedder(y)
    for block in net.blocks:
        tokens = block(tokens, c)
    assert torch.equal(net.unpatchify(net.final_layer(tokens, c)), net(x, t, s, y))
    convolved = net.x_embedder.proj(x).flatten(2).transpose(1, 2)
    assert torch.allclose(net.x_embedder(x), convolved, atol=1e-5)


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_sharded_blocks_take_effect(one_process):
    """`fully_shard` on each block: the same output and gradients, and a refusal where parameters are read directly."""
    net, plain = network(), network()
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    assert net.changed_part() == "blocks.0"
    wanted, got = gradients(plain), gradients(net)
    assert torch.equal(got["output"], wanted["output"])
    for name, value in wanted.items():
        given = got[name].full_tensor() if hasattr(got[name], "full_tensor") else got[name]
        assert torch.allclose(given, value, atol=1e-5), name
    x, t, s, y, dx = inputs()
    with pytest.raises(ValueError, match=r"^net\.blocks\.0 was replaced, wrapped or hooked"):
        paired_forward(net, x, dx, t, 0 * t, s, y)


def test_another_convolution_is_called():
    net = network()
    layer = net.x_embedder.proj = nn.Conv2d(2, 40, 2, stride=2, padding=1, dilation=2)
    x = inputs()[0]
    assert net.changed_part() == "x_embedder.proj"
    assert torch.equal(net.x_embedder(x), layer(x).flatten(2).transpose(1, 2))


@pytest.mark.filterwarnings("ignore")
def test_export_with_a_dynamic_batch():
    net = network()
    given = inputs()[:4]
    batch = torch.export.Dim("batch", min=2)
    with torch.no_grad():
        exported = torch.export.export(net, given, dynamic_shapes=({0: batch},) * 4).module()
        fewer = tuple(value[:3] for value in given)
        assert torch.allclose(exported(*fewer), net(*fewer), atol=1e-5)


def test_an_embedding_that_does_more_than_look_up_is_called():
    net, plain = network(), network()
    net.y_embedder.embedding_table.max_norm = 0.1
    assert net.changed_part() == "y_embedder.embedding_table"
    assert not torch.allclose(forward(net), forward(plain))
