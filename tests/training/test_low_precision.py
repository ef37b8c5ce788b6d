"""bf16 parameters with float32 masters: what the model multiplies with is what somebody wrote, at the next forward."""

import copy
import dataclasses

import pytest
import torch
from safetensors.torch import load_file, load_model, save_model
from torch import nn
from torch.nn.utils import prune

from soflow_fast import DiTConfig, ObjectiveConfig, TrainState, preset, train_step
from soflow_fast.training.precision import round_parameters

SIZES = DiTConfig(input_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=2, num_heads=2, num_classes=10)


def state(precision="bf16", **fields):
    config = preset("digits", precision=precision, device="cpu", batch_size=8, **fields)
    run = TrainState.build(dataclasses.replace(config, model=SIZES, objective=ObjectiveConfig()))
    with torch.no_grad():  # off the initial zeros, where half of the gradients vanish
        weights = {
            name: value + 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(i))
            for i, (name, value) in enumerate(run.weights().items())
        }
        run.load_weights(weights)
    return run


def batch(n=8, seed=0):
    source = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 8, 8, generator=source), torch.randint(10, (n,), generator=source)


def forward(network):
    x, y = batch(4)
    t = torch.linspace(0.1, 0.9, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return network(x, t, t / 2, y)


def fresh(network):
    """The output of a network made anew from the same state dict."""
    other = state().flow.network
    other.load_state_dict(network.state_dict())
    return forward(other)


def low(run):
    return [p for p in run.flow.parameters() if p.dtype == torch.bfloat16]


def by_fused_adamw(network):
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(network.parameters(), lr=0.1, fused=True).step()


def by_diffusers(network):
    training_utils = pytest.importorskip("diffusers.training_utils")
    average = training_utils.EMAModel(network.parameters(), decay=0.5)
    average.shadow_params = [p + 0.5 for p in average.shadow_params]
    average.store(network.parameters())
    average.copy_to(network.parameters())
    copied = forward(network)
    assert torch.equal(copied, fresh(network))
    average.restore(network.parameters())
    assert not torch.equal(copied, forward(network))


WRITERS = {
    "data.copy_": lambda network: [p.data.copy_(p.data * 1.5) for p in network.parameters()],
    "foreach": lambda network: torch._foreach_copy_(
        list(network.parameters()), [p.detach() * 1.5 for p in network.parameters()]
    ),
    "fused AdamW": by_fused_adamw,
    "load_state_dict": lambda network: network.load_state_dict({k: v * 1.5 for k, v in network.state_dict().items()}),
    "assigned": lambda network: network.load_state_dict(
        {k: v * 1.5 for k, v in network.state_dict().items()}, assign=True
    ),
    "through the state dict": lambda network: [v.copy_(v * 1.5) for v in network.state_dict().values()],
    "an initialiser": lambda network: [nn.init.normal_(p) for p in network.parameters()],
    "replaced": lambda network: setattr(network.blocks[0].mlp.fc1, "weight", nn.Parameter(torch.full((128, 32), 0.3))),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("writer", list(WRITERS))
def test_the_next_forward_takes_what_was_written(writer, precision):
    network = state(precision).flow.network
    before = forward(network)
    with torch.no_grad():
        WRITERS[writer](network)
    assert torch.equal(forward(network), fresh(network))
    assert not torch.equal(forward(network), before)


def test_the_next_forward_takes_what_diffusers_wrote():
    network = state().flow.network
    before = forward(network)
    by_diffusers(network)
    assert torch.equal(forward(network), before)  # restored


@pytest.mark.parametrize("optimizer", ["soflow", "torch"])
def test_the_next_step_starts_from_what_was_written(optimizer):
    """Not from a master that is older: the two runs differ in who wrote the same values."""
    written, loaded = (state(optimizer=optimizer, **{"optim.lr": 1e-3}) for _ in range(2))
    for run in (written, loaded):
        train_step(run, *batch())
    with torch.no_grad():
        for p in written.flow.parameters():
            p.data.mul_(1.25)
        loaded.load_weights({k: v.float() for k, v in written.flow.state_dict().items()})
    for run in (written, loaded):
        train_step(run, *batch(seed=1))
    for a, b in zip(written.weights().values(), loaded.weights().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("optimizer", ["soflow", "torch"])
def test_parameters_are_their_masters_rounded(optimizer):
    run = state(optimizer=optimizer, **{"optim.lr": 1e-3})
    for seed in range(3):
        train_step(run, *batch(seed=seed))
    masters = run.optimizer.masters
    assert len(low(run)) == 2 * (4 * SIZES.depth + SIZES.depth + 1)
    assert all(m.dtype == torch.float32 for m in masters)
    for p, m in zip(run.flow.parameters(), masters, strict=True):
        assert torch.equal(p, m.to(p.dtype))
    assert any(not torch.equal(m, m.bfloat16().float()) for m in masters)  # they hold more than the parameters do


def test_only_the_ends_are_float32():
    named = dict(state().flow.network.named_parameters())
    blocks = {name for name, p in named.items() if p.dtype == torch.bfloat16}
    assert blocks == {name for name in named if name.startswith("blocks.") or "adaLN" in name}


def test_a_deep_copy_is_a_network_of_its_own():
    network = state().flow.network
    other = copy.deepcopy(network)
    before = forward(network)
    with torch.no_grad():
        other.blocks[0].attn.qkv.weight.add_(1)
    assert torch.equal(forward(network), before) and not torch.equal(forward(other), before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_safetensors_and_state_dict_take_the_live_network(precision, tmp_path):
    run, other = state(precision), state(precision)
    train_step(run, *batch())
    save_model(run.flow.network, str(tmp_path / "model.safetensors"))
    assert load_file(tmp_path / "model.safetensors").keys() == run.flow.network.state_dict().keys()
    assert "blocks.0.adaLN_modulation.1.weight" in run.flow.network.state_dict()  # the public names
    load_model(other.flow.network, str(tmp_path / "model.safetensors"))
    assert torch.equal(forward(other.flow.network), forward(run.flow.network))


def test_gradients_are_bf16_and_sums_float32():
    run = state()
    train_step(run, *batch())
    layer = run.flow.network.blocks[0].attn.qkv
    assert layer.weight.grad.dtype == torch.bfloat16
    assert run.flow.network.final_layer.linear.weight.grad.dtype == torch.float32
    summed = state(micro_batch=4)
    train_step(summed, *batch())
    wide = summed.flow.network.blocks[0].attn.qkv.weight.grad
    assert wide.dtype == torch.float32
    assert not torch.equal(wide, wide.bfloat16().float())
    assert (wide - layer.weight.grad).norm() <= 2e-2 * wide.norm()


def test_bf16_training_stays_near_float32():
    """The same draws: after some steps the masters have gone the same way."""
    run, exact = state("bf16", **{"optim.lr": 1e-3}), state("fp32", **{"optim.lr": 1e-3})
    start = exact.weights()
    start = {name: value.clone() for name, value in start.items()}
    for _ in range(5):
        for each in (run, exact):
            train_step(each, *batch())
    ours, theirs = (
        torch.cat([(value - start[name]).flatten() for name, value in each.weights().items()]) for each in (run, exact)
    )
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.95


def test_the_weights_of_modulations_are_not_copied_for_their_products():
    """Each product is written to its columns. As one product, a copy of all weights would come first."""
    network = state().flow.network
    products, copied = [], []

    class Watched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            out = operation(*args, **(kwargs or {}))
            if operation._overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.mm):
                products.append(tuple(args[-1].shape))
            if operation._overloadpacket in (torch.ops.aten.cat, torch.ops.aten.stack):
                copied.append(out.numel())
            return out

    with Watched():
        forward(network)
    D = SIZES.hidden_size
    assert products.count((D, 6 * D)) == SIZES.depth and products.count((D, 2 * D)) == 1
    assert not any(size >= 6 * D * D * SIZES.depth for size in copied)


def test_masters_are_what_the_parameters_were():
    net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    before = [p.detach().clone() for p in net.parameters()]
    masters = round_parameters(net, [net[0]], torch.bfloat16)
    assert [p.dtype for p in net.parameters()] == [torch.bfloat16] * 2 + [torch.float32] * 2
    assert all(torch.equal(m, b) for m, b in zip(masters[:2], before, strict=False)) and masters[2:] == [None, None]
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("optimizer", ["soflow", "torch"])
def test_weights_are_what_was_written_since(optimizer):
    """Without a step in between: so a checkpoint holds them."""
    run = state(optimizer=optimizer, **{"optim.lr": 1e-3})
    train_step(run, *batch())
    with torch.no_grad():
        for p in run.flow.parameters():
            p.data.mul_(1.25)
    kept = run.weights()
    assert all(torch.equal(kept[name].to(p.dtype), p) for name, p in run.flow.named_parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("writer", ["assigned", "replaced"])
def test_a_step_names_a_parameter_that_the_optimiser_lacks(writer, precision):
    run = state(precision)
    WRITERS[writer](run.flow.network)
    first = "x_embedder.proj.weight" if writer == "assigned" else "blocks.0.mlp.fc1.weight"
    with pytest.raises(ValueError, match=rf"^network\.{first} is not a parameter of the optimiser"):
        train_step(run, *batch())


def increment(run):
    seen = []
    train_step(run, *batch(), observe=lambda name, **values: seen.append(values.get("increment")))
    return next(value for value in seen if value is not None)


def hooked(network):
    network.register_forward_hook(lambda module, given, out: out * 1.5)


def tied(network):
    network.blocks[1] = network.blocks[0]


@pytest.mark.parametrize("change", [hooked, tied])
def test_the_target_sees_a_hook_on_the_network_and_a_block_used_twice(change):
    low, exact = state("bf16"), state("fp32")
    change(low.flow.network)
    change(exact.flow.network)
    got, wanted = increment(low), increment(exact)
    assert (got - wanted).norm() <= 0.1 * wanted.norm()


def test_the_target_sees_hooks_of_all_modules():
    low, exact = state("bf16"), state("fp32")

    def hook(module, given, out):
        return out * 1.5 if isinstance(module, nn.Linear) else None

    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        got, wanted = increment(low), increment(exact)
    finally:
        handle.remove()
    assert (got - wanted).norm() <= 0.1 * wanted.norm()


def test_masters_are_found_where_names_are_reordered():
    """Pruning registers a weight anew, behind its bias: each master still belongs to its parameter."""
    run = state()
    before = run.weights()
    prune.identity(run.flow.network.blocks[0].mlp.fc1, "weight")
    after = run.weights()
    prefix = "network.blocks.0.mlp.fc1."
    assert torch.equal(after[prefix + "weight_orig"], before[prefix + "weight"])
    assert torch.equal(after[prefix + "bias"], before[prefix + "bias"])
