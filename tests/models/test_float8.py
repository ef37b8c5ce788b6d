"""float8 products: torchao's linear layers, emulated here, inside the block."""

import dataclasses

import pytest
import torch

from soflow_fast import DiTConfig, ObjectiveConfig, TrainState, preset, train_step
from soflow_fast.data import open_source
from soflow_fast.errors import ConfigError
from soflow_fast.models import float8
from soflow_fast.models.plain_layers import call_layer, is_float8
from soflow_fast.training.step import Samples, _guidance, draw

SIZES = DiTConfig(input_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=2, num_heads=2, num_classes=10)
CONFIG = dataclasses.replace(
    preset("digits", precision="fp8", device="cpu", batch_size=8), model=SIZES, objective=ObjectiveConfig()
)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torchao", "ignore::DeprecationWarning:torchao")


@pytest.fixture
def emulated(monkeypatch):
    pytest.importorskip("torchao.float8")
    original = float8.use_float8
    monkeypatch.setattr(float8, "require", lambda *given: None)
    monkeypatch.setattr(float8, "use_float8", lambda net: original(net, emulate=True))


def build(precision="fp8", **fields):
    run = TrainState.build(dataclasses.replace(CONFIG, precision=precision, **fields))
    with torch.no_grad():  # off the initial zeros, where half of the gradients vanish
        for i, p in enumerate(run.flow.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return run


def batch(seed=0):
    source = torch.Generator().manual_seed(seed)
    return torch.randn(8, 1, 8, 8, generator=source), torch.randint(10, (8,), generator=source)


def relative(got, wanted):
    return ((got - wanted).norm() / wanted.norm()).item()


def test_only_bf16_inputs_of_the_blocks_are_multiplied_in_float8(emulated):
    network = build().flow.network
    layer = network.blocks[0].mlp.fc1
    x = torch.randn(16, 32).bfloat16()
    exact = x.float() @ layer.weight.float().T + layer.bias.float()
    assert 5e-3 < relative(call_layer(layer, x), exact) < 6e-2  # bf16 would be 2e-3
    assert relative(call_layer(layer, x.float()), exact) < 1e-5
    plain = {name for name, part in network.named_modules() if type(part) is torch.nn.Linear}
    replaced = {name for name, part in network.named_modules() if is_float8(part)}
    assert len(replaced) == 4 * SIZES.depth and all(name.startswith("blocks.") for name in replaced)
    assert "final_layer.linear" in plain and "blocks.0.adaLN_modulation.1" in plain
    assert network.changed_part() == "blocks.0.attn.qkv" and network.changed_part(float8=True) is None


def test_parameters_and_keys_stay(emulated):
    run, plain = build(), build("bf16")
    assert list(run.flow.state_dict()) == list(plain.flow.state_dict())
    assert [p.dtype for p in run.flow.parameters()] == [p.dtype for p in plain.flow.parameters()]
    run.load_weights(plain.weights())
    assert all(torch.equal(a, b) for a, b in zip(run.flow.parameters(), plain.flow.parameters(), strict=True))


def test_a_pair_in_low_precision_is_refused(emulated):
    with pytest.raises(ConfigError, match=r"^--quotient-precision bf16: a pair in a step of fp8 is fp32 or tf32$"):
        build(quotient="pair", quotient_precision="bf16")
    state = build(quotient="pair")
    x0, y = batch()
    state.config = dataclasses.replace(state.config, run=dataclasses.replace(state.config.run, check_quotient_every=1))
    assert train_step(state, x0, y)["q_cosine"] > 0.999  # float32 pairs do not go through float8


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_a_step_is_near_its_bf16_self(recompute, emulated):
    run = build(run=dataclasses.replace(CONFIG.run, recompute=recompute))
    exact = build("fp32")
    got, wanted = train_step(run, *batch()), train_step(exact, *batch())
    assert run.target.kind == "increments" and run.target.precision == "bf16" and not run.rides_along()
    torch.testing.assert_close(got["fm_mse"], wanted["fm_mse"], rtol=0.1, atol=0)
    torch.testing.assert_close(got["sc_mse"], wanted["sc_mse"], rtol=0.3, atol=0)

    def gradient(state):
        return torch.cat([p.grad.float().flatten() for p in state.flow.parameters()])

    assert torch.cosine_similarity(gradient(run), gradient(exact), dim=0) > 0.98
    before = [p.detach().clone() for p in run.flow.parameters()]
    train_step(run, *batch(1))
    assert all(not torch.equal(p, q) for p, q in zip(run.flow.parameters(), before, strict=True))


def test_guidance_alone_in_float8(emulated):
    """The velocities of the student's own parameters, near those of bf16, and nothing else of the step."""
    run, plain = build("bf16", guidance_precision="fp8"), build("bf16")
    assert run.guide is not None and plain.guide is None
    assert float8.is_twin(run.guide.network, run.flow.network)
    assert run.flow.network.changed_part() is None and run.guide.network.changed_part() == "blocks.0.attn.qkv"
    x0, y = batch()
    for k in range(2):  # the update moves the parameters of both
        seen = []
        for state in (run, plain):
            draws = draw(state, x0.shape)
            x_t, v_t = state.flow.point(x0, draws.x1, draws.t)
            samples = Samples(x_t, v_t, draws.t, draws.l, draws.s, y, draws.label_dropped, draws.n_fm)
            seen.append(_guidance(state, samples, {})[0])
        assert 1e-3 < relative(*seen) < 0.1, k
        for state in (run, plain):
            train_step(state, x0, y)
    assert run.rides_along()
    run.flow.network.blocks[0].attn.qkv.weight = torch.nn.Parameter(torch.zeros(96, 32).bfloat16())
    with pytest.raises(ValueError, match=r"^state\.guide: its parameters are no longer the network's"):
        _guidance(run, samples, {})


def test_guidance_in_float8_learns_the_digits_as_well(emulated):
    """Losses over 60 steps of both stay within what two seeds differ by."""
    config = preset("digits", device="cpu", precision="bf16", steps=60, batch_size=64)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, depth=2, hidden_size=64, num_heads=2))

    def losses(**fields):
        state = TrainState.build(dataclasses.replace(config, **fields))
        source = open_source(config)
        return sum(float(train_step(state, *source.batch(k))["fm_mse"]) for k in range(60) if k >= 40) / 20

    usual, low, other = losses(), losses(guidance_precision="fp8"), losses(seed=1)
    assert low != usual and abs(low - usual) < max(abs(other - usual), 0.02 * usual)


def test_guidance_in_float8_needs_a_step_in_bf16(emulated):
    with pytest.raises(ConfigError, match=r"^--guidance-precision fp8: the step must be in bf16, it is in fp32$"):
        build("fp32", guidance_precision="fp8")
    assert build("fp8", guidance_precision="fp8").guide is None  # all of the step is


def test_refusals(monkeypatch):
    model = SIZES
    with monkeypatch.context() as patch:
        patch.setattr(float8.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ConfigError, match=r"^--precision fp8: torchao is not installed"):
            build()
    monkeypatch.setattr(float8.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ConfigError, match=r"^--precision fp8: needs an NVIDIA GPU of compute capability 8.9"):
        build()
    with pytest.raises(ConfigError, match=r"^--guidance-precision fp8: needs an NVIDIA GPU"):
        build("bf16", guidance_precision="fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ConfigError, match=r"hidden_size must be a multiple of 16, got 40"):
        float8.require(dataclasses.replace(model, hidden_size=40), torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"tokens must be a multiple of 16, got 4"):
        float8.require(dataclasses.replace(model, patch_size=4), torch.device("cuda"))
    float8.require(model, torch.device("cuda"))
