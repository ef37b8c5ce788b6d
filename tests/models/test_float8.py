"""float8 products: torchao's linear layers, emulated here, inside the block."""

import dataclasses

import pytest
import torch

from soflow_fast import DiTConfig, ObjectiveConfig, TrainState, preset, train_step
from soflow_fast.errors import ConfigError
from soflow_fast.models import float8
from soflow_fast.models.low_precision import operands

SIZES = DiTConfig(input_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=2, num_heads=2, num_classes=10)
CONFIG = dataclasses.replace(
    preset("digits", precision="fp8", device="cpu", batch_size=8), model=SIZES, objective=ObjectiveConfig()
)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torchao", "ignore::DeprecationWarning:torchao")


@pytest.fixture
def emulated(monkeypatch):
    pytest.importorskip("torchao.float8")
    original = float8.use_float8
    monkeypatch.setattr(float8, "require", lambda model, device: None)
    monkeypatch.setattr(float8, "use_float8", lambda layers: original(layers, emulate=True))


def build(precision="fp8", **fields):
    run = TrainState.build(dataclasses.replace(CONFIG, precision=precision, **fields))
    with torch.no_grad():  # off the initial zeros, where half of the gradients vanish
        for i, p in enumerate(run.flow.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return run


def batch(seed=0):
    source = torch.Generator().manual_seed(seed)
    return torch.randn(8, 1, 8, 8, generator=source), torch.randint(10, (8,), generator=source)


def test_products_are_float8_only_where_they_are_meant_to_be(emulated):
    run = build()
    layer = run.flow.network.blocks[0].mlp.fc1
    x = torch.randn(16, 32).bfloat16()
    exact = x.float() @ layer.weight.T
    assert operands(layer, torch.bfloat16).product is None
    with float8.float8_products():
        assert operands(layer, torch.float32).product is None
        assert operands(run.flow.network.final_layer.linear, torch.bfloat16).product is None
        product = operands(layer, torch.bfloat16).product
        assert product is not None
        out = product(x)
    error = (out - exact).norm() / exact.norm()
    assert 5e-3 < error < 6e-2  # bf16 would be 2e-3


def test_parameters_and_keys_stay(emulated):
    run, plain = build(), build("bf16")
    assert list(run.flow.state_dict()) == list(plain.flow.state_dict())
    assert run.parameter_count() == plain.parameter_count()
    run.flow.load_state_dict({k: v.clone() for k, v in plain.flow.state_dict().items()}, assign=True)
    layer = run.flow.network.blocks[1].attn.proj
    with float8.float8_products():
        assert operands(layer, torch.bfloat16).product.weight is layer.weight


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_a_step_is_near_its_bf16_self(recompute, emulated):
    run = build(run=dataclasses.replace(CONFIG.run, recompute=recompute))
    exact = build("fp32")
    got, wanted = train_step(run, *batch()), train_step(exact, *batch())
    assert run.quotient.kind == "increments" and run.quotient.precision == "bf16" and not run.rides_along()
    torch.testing.assert_close(got["fm_mse"], wanted["fm_mse"], rtol=0.1, atol=0)
    torch.testing.assert_close(got["sc_mse"], wanted["sc_mse"], rtol=0.3, atol=0)

    def gradient(state):
        return torch.cat([p.grad.float().flatten() for p in state.flow.parameters()])

    assert torch.cosine_similarity(gradient(run), gradient(exact), dim=0) > 0.98
    before = [p.detach().clone() for p in run.flow.parameters()]
    train_step(run, *batch(1))
    assert all(not torch.equal(p, q) for p, q in zip(run.flow.parameters(), before, strict=True))


def test_refusals(monkeypatch):
    model = SIZES
    with monkeypatch.context() as patch:
        patch.setattr(float8.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ConfigError, match=r"^--precision fp8: torchao is not installed"):
            build()
    monkeypatch.setattr(float8.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ConfigError, match=r"^--precision fp8: needs an NVIDIA GPU of compute capability 8.9"):
        build()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ConfigError, match=r"hidden_size must be a multiple of 16, got 40"):
        float8.require(dataclasses.replace(model, hidden_size=40), torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"tokens must be a multiple of 16, got 4"):
        float8.require(dataclasses.replace(model, patch_size=4), torch.device("cuda"))
    float8.require(model, torch.device("cuda"))
