"""The products around the GELU of an MLP: each way against float64, alone, in a network and in a step."""

import dataclasses
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from soflow_fast import TrainState, preset, train_step
from soflow_fast.config.schema import DiTConfig
from soflow_fast.models import fused_layers, mlp_products
from soflow_fast.models.dit import TapedOutputs
from soflow_fast.models.mlp_products import KERNELS, PLAIN, QUACK, why_not
from soflow_fast.models.paired_forward import paired_forward
from tests import fake_quack
from tests.networks import gradients, inputs, network

CPU, GPU, LOW = torch.device("cpu"), torch.device("cuda"), torch.bfloat16
WAYS = {"plain": PLAIN, "kernels": KERNELS, "quack": QUACK}


@pytest.fixture
def quack(monkeypatch: Any) -> fake_quack.FakeQuack:
    return fake_quack.put_in_place(monkeypatch)


def operands(*rows: int, D: int = 24, inner: int = 40) -> list[torch.Tensor]:
    """h, W1, b1, dout, W2 in bf16."""
    source = torch.Generator().manual_seed(0)
    sizes = ((*rows, D), (inner, D), (inner,), (*rows, D), (D, inner))
    return [torch.randn(size, generator=source).mul(0.5 if len(size) == 2 else 1).to(LOW) for size in sizes]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rows", [(3, 5), (7,), (2, 3, 2), (1, 1)], ids=str)
def test_each_way_gives_the_values_and_gradients_of_float64(way, rows, quack):
    h, w1, b1, dout, w2 = operands(*rows)
    exact = [value.double().requires_grad_() for value in (h, w1, b1)]
    u = F.linear(*exact)
    inner = F.gelu(u, approximate="tanh")
    du, db1 = torch.autograd.grad(inner @ w2.double().t(), (u, exact[2]), dout.double())
    products = WAYS[way]
    got_u, got_inner = products.forward(h, w1, b1)
    got_du, got_db1, again = products.backward(dout, w2, got_u, b1)
    if way != "quack":  # whose product is torch's
        assert torch.equal(products.product(h, w1, b1), got_u)
    pairs = {
        "u": (got_u.double() + (b1.double() if products.defers_bias else 0), u),
        "inner": (got_inner, inner),
        "du": (got_du, du),
        "db1": (got_db1, db1),
        "again": (again, inner),
        "product": (products.product(h, w1, b1).double() + (b1.double() if products.defers_bias else 0), u),
    }
    for name, (got, right) in pairs.items():
        assert got.shape == right.shape, name
        assert (got.double() - right).norm() <= 2**-6 * right.norm(), name
    assert {value.dtype for value in (got_u, got_inner, got_du, got_db1, again)} == {LOW}


def test_quack_gets_rows_and_no_search(quack):
    h, w1, b1, dout, w2 = operands(3, 5)
    u, _ = QUACK.forward(h, w1, b1)
    QUACK.backward(dout.transpose(0, 1).contiguous().transpose(0, 1), w2, u, b1)  # rows that are no view
    assert [call.name for call in quack.calls] == ["gemm_act", "gemm_dact"]
    assert [call.options for call in quack.calls] == [{"tuned": False}] * 2
    assert quack.calls[0].tensors[1].data_ptr() == w1.data_ptr()  # a view: no copy of the weights
    assert torch.equal(quack.calls[1].tensors[0], dout.flatten(0, 1))


def test_the_ways_go_by_name_dtype_and_place(monkeypatch):
    x = torch.ones(2, 3)
    assert mlp_products.mlp_products("kernels", x, LOW) is PLAIN
    assert mlp_products.mlp_products("quack", x, LOW) is QUACK
    assert mlp_products.mlp_products("quack", x, torch.float32) is PLAIN
    monkeypatch.setattr(mlp_products, "use_kernel", lambda *given: True)
    assert mlp_products.mlp_products("kernels", x, LOW) is KERNELS
    assert mlp_products.mlp_products("quack", x, torch.float32) is KERNELS


# In a network


def biased(*arguments: Any, **named: Any) -> Any:
    """A network whose biases in the blocks are not to be missed, nor added twice."""
    net = network(*arguments, **named)
    with torch.no_grad():
        for block in net.blocks:
            for layer in (block.attn.proj, block.mlp.fc1, block.mlp.fc2):
                layer.bias.add_(1)
    return net


@pytest.mark.parametrize(
    ("recompute", "keep_norms"), [("none", False), ("none", True), ("mlp", False), ("block", False)]
)
def test_a_networks_gradients_are_as_near_to_float64(recompute, keep_norms, quack):
    exact = gradients(biased(torch.float64))
    usual = gradients(biased(rounded=LOW, keep_norms=True), autocast=True)
    assert quack.calls == []
    net = biased(rounded=LOW, recompute=recompute, keep_norms=keep_norms, mlp="quack")
    got = gradients(net, autocast=True)
    names = [call.name for call in quack.calls]
    assert names.count("gemm_act") == (6 if recompute == "block" else 3) and names.count("gemm_dact") == 3
    for name, value in exact.items():
        error, before = ((each[name].double() - value).norm() for each in (got, usual))
        assert error <= 1.5 * before + 1e-3 * value.norm(), name


def test_without_a_backward_or_in_float32_quack_is_not_called(quack):
    net = network(rounded=LOW, mlp="quack")
    *given, _ = inputs()
    with torch.no_grad(), torch.autocast("cpu", LOW):
        net(*given)
    gradients(network(mlp="quack"))  # in float32
    assert quack.calls == []


@pytest.mark.parametrize("later", [False, True], ids=["biases with the products", "biases deferred"])
@pytest.mark.parametrize("mlp", ["kernels", "quack"])
def test_the_increment_rides_along(mlp, later, quack, monkeypatch):
    """Whoever makes the values, and whether fc1's lack their bias: the increments are those of a pass of its own."""
    for module in (fused_layers, mlp_products):
        monkeypatch.setattr(module, "use_kernel", lambda *given: later)
    net = biased(rounded=LOW, mlp=mlp)
    x, t, s, y, direction = inputs()
    tape, exact = TapedOutputs(slice(None)), network(torch.float64)
    with torch.autocast("cpu", LOW):
        net(x, t, s, y, tape=tape)
    assert len(quack.calls) == (3 if mlp == "quack" else 0)
    assert [at.deferred for at in tape.blocks] == [(later, later and mlp == "kernels")] * 3
    exact.load_state_dict({name: value.double() for name, value in net.state_dict().items()})
    change, dt = 0.01 * direction, torch.full_like(t, 0.01)
    right = paired_forward(exact, *(v.double() for v in (x, change, t, dt, s)), y, torch.float64)[1]
    got = paired_forward(net, x, change, t, dt, s, y, LOW, tape=tape)[1]
    assert (got.double() - right).norm() <= 0.02 * right.norm()


SIZES = DiTConfig(input_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=2, num_heads=2, num_classes=10)


def a_step(mlp: str) -> dict[str, torch.Tensor]:
    """Losses and gradients of one step in bf16, off the initial zeros."""
    config = preset("digits", precision="bf16", device="cpu", batch_size=8)
    state = TrainState.build(dataclasses.replace(config, model=SIZES))
    state.load_weights(
        {
            name: value + 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(i))
            for i, (name, value) in enumerate(state.weights().items())
        }
    )
    state.flow.network.keep_norms, state.flow.network.mlp = False, mlp
    found: dict[str, torch.Tensor] = {}

    def observe(name: str, **values: Any) -> None:
        if name == "update":
            found.update({name: p.grad.double() for name, p in state.flow.named_parameters() if p.grad is not None})

    source = torch.Generator().manual_seed(0)
    batch = torch.randn(8, 1, 8, 8, generator=source), torch.randint(10, (8,), generator=source)
    metrics = train_step(state, *batch, observe=observe)
    assert state.rides_along()
    return {**found, **{name: metrics[name].double() for name in ("fm_loss", "sc_loss", "sc_mse", "grad_norm")}}


def test_a_whole_step_is_the_same_to_rounding(quack):
    kernels = a_step("kernels")
    assert quack.calls == []
    got = a_step("quack")
    assert [call.name for call in quack.calls] == ["gemm_act"] * 2 + ["gemm_dact"] * 2
    assert got.keys() == kernels.keys() and len(got) > 30
    assert any(not torch.equal(got[name], value) for name, value in kernels.items())
    for name, value in kernels.items():
        assert (got[name] - value).norm() <= 0.03 * value.norm(), name


# Why not


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "widths", "reason"),
    [
        (GPU, (9, 0), LOW, (1152, 4608), None),
        (GPU, (10, 0), LOW, (), None),
        (CPU, (9, 0), LOW, (), "needs an NVIDIA GPU"),
        (GPU, (8, 9), LOW, (), "needs compute capability 9.0 or more, the GPU has 8.9"),
        (GPU, (9, 0), torch.float32, (), "needs bf16"),
        (GPU, (9, 0), LOW, (1152, 4612), "widths 1152 and 4612: it takes multiples of 8"),
    ],
)
def test_what_quack_lacks_is_said(device, capability, dtype, widths, reason, quack, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert why_not(device, dtype, *widths) == reason
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert why_not(device, dtype, *widths) == "needs an NVIDIA GPU"


def test_a_quack_that_is_not_there_or_broken_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(mlp_products, "version", lambda package: None)
    for name in ("quack", "quack.gemm_interface"):
        monkeypatch.setitem(sys.modules, name, None)  # an import then fails as if it was not there
    assert why_not(GPU, LOW) == "quack-kernels is not installed (pip install quack-kernels)"

    def fails() -> None:
        raise OSError("libcuda.so.1: cannot open\nand more")

    monkeypatch.setattr(mlp_products, "_quack", fails)
    assert why_not(GPU, LOW) == "quack-kernels cannot be imported: libcuda.so.1: cannot open"
