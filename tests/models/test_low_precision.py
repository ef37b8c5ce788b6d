"""Copies of weights in low precision: they follow their masters, whoever changes those."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from soflow_fast import DiTConfig, ObjectiveConfig, TrainState, preset, train_step
from soflow_fast.models.low_precision import keep_copies, operands, stack_in_place

SIZES = DiTConfig(input_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=2, num_heads=2, num_classes=10)


def layers():
    return [nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 2)]


def state(precision="bf16", **fields):
    config = preset("digits", precision=precision, device="cpu", batch_size=8, **fields)
    run = TrainState.build(dataclasses.replace(config, model=SIZES, objective=ObjectiveConfig()))
    with torch.no_grad():  # off the initial zeros, where half of the gradients vanish
        for i, p in enumerate(run.flow.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return run


def batch(n=8):
    source = torch.Generator().manual_seed(0)
    return torch.randn(n, 1, 8, 8, generator=source), torch.randint(10, (n,), generator=source)


def is_copy(layer):
    weight = operands(layer, torch.bfloat16)
    return torch.equal(weight.low, layer.weight.bfloat16()) and torch.equal(weight.bias, layer.bias.bfloat16())


CHANGES = {
    "by an initialiser": lambda layer: nn.init.normal_(layer.weight),
    "loaded": lambda layer: layer.load_state_dict({"weight": torch.ones(4, 6), "bias": torch.ones(4)}),
    "assigned": lambda layer: layer.load_state_dict({"weight": torch.ones(4, 6), "bias": torch.ones(4)}, assign=True),
    "replaced": lambda layer: setattr(layer, "weight", nn.Parameter(torch.full((4, 6), 3.0))),
}


@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.parametrize("stacked", [False, True])
def test_a_copy_follows_its_master(change, stacked):
    first, *others = layers()
    keep_copies([] if stacked else [first], [first, *others] if stacked else others, torch.bfloat16)
    assert is_copy(first)
    CHANGES[change](first)
    assert is_copy(first)


def test_a_copy_is_made_once():
    layer, *others = layers()
    keep_copies([layer], others, torch.bfloat16)
    assert operands(layer, torch.bfloat16).low is operands(layer, torch.bfloat16).low
    with torch.no_grad():
        layer.copy.weight.fill_(7)  # what nobody noticed stays
    assert (operands(layer, torch.bfloat16).low == 7).all()


def test_other_dtypes_take_the_weight_or_a_copy_of_the_moment():
    layer, *others = layers()
    keep_copies([layer], others, torch.bfloat16)
    assert operands(layer, torch.float32).low is layer.weight
    assert operands(layer, torch.float16).low.dtype == torch.float16


def test_copies_are_no_parameters():
    with_copies, without = state(), state("fp32")
    assert list(with_copies.flow.state_dict()) == list(without.flow.state_dict())
    assert with_copies.parameter_count() == without.parameter_count()


def test_a_deep_copy_has_copies_of_its_own():
    network = state().flow.network
    other = copy.deepcopy(network)
    layer = other.blocks[0].attn.qkv
    assert layer.copy.weight.data_ptr() != network.blocks[0].attn.qkv.copy.weight.data_ptr()
    with torch.no_grad():
        layer.weight.add_(1)
    assert is_copy(layer) and is_copy(network.blocks[0].attn.qkv)


def test_a_moved_network_stays_right():
    """`to` gives parameters new memory: the copies of the old ones are not taken."""
    net = state().flow.network.double()
    assert operands(net.blocks[0].attn.qkv, torch.float64).low is net.blocks[0].attn.qkv.weight
    assert is_copy(net.blocks[0].attn.qkv)


def test_stack_in_place_keeps_the_parameters():
    some = layers()
    parameters = [p for layer in some for p in layer.parameters()]
    values = [p.detach().clone() for p in parameters]
    stack = stack_in_place(some)
    assert all(a is b for a, b in zip(parameters, (p for layer in some for p in layer.parameters()), strict=True))
    assert all(torch.equal(p, value) for p, value in zip(parameters, values, strict=True))
    assert torch.equal(stack.weight, torch.cat([layer.weight for layer in some]))
    assert stack.holds([operands(layer, torch.float32) for layer in some])
    some[1].weight = nn.Parameter(torch.zeros(4, 6))
    assert not stack.holds([operands(layer, torch.float32) for layer in some])


def test_the_optimiser_writes_masters_and_copies():
    run = state()
    for _ in range(3):
        train_step(run, *batch())
    for layer in run.flow.network.copied_layers():
        assert layer.copy.seen is not None
        before = layer.copy.weight.clone()
        assert is_copy(layer)
        assert torch.equal(before, layer.copy.weight)
    assert all(p.dtype == torch.float32 for p in run.flow.parameters())


def test_gradients_of_copied_weights_are_bf16_and_sums_float32():
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
    low, exact = state("bf16", **{"optim.lr": 1e-3}), state("fp32", **{"optim.lr": 1e-3})
    start = [p.detach().clone() for p in exact.flow.parameters()]
    for _ in range(5):
        for run in (low, exact):
            train_step(run, *batch())
    ours, theirs = (
        torch.cat([(p - s).flatten() for p, s in zip(run.flow.parameters(), start, strict=True)])
        for run in (low, exact)
    )
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.95


def test_changes_that_leave_no_trace_are_told():
    network = state().flow.network
    layer = network.blocks[0].mlp.fc1
    assert is_copy(layer)
    layer.weight.data.mul_(1.5)
    network.forget_copies()
    assert is_copy(layer)


def test_a_flow_made_in_inference_mode():
    with torch.inference_mode():
        first, *others = layers()
        keep_copies([first], others, torch.bfloat16)
        assert is_copy(first)
        first.weight.add_(1)
        assert is_copy(first)


def test_a_deep_copy_keeps_its_stack():
    network = copy.deepcopy(state().flow.network)
    weights = [operands(layer, torch.bfloat16) for layer in network.modulation_layers()]
    assert network.stack is not None and network.stack.holds(weights)
