"""The MeanFlow baselines: how du/dt is compiled, what it costs, who cannot run."""

import sys
import types
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad

from benchmarks.baselines import dual, meanflow
from benchmarks.baselines.meanflow import At, Student
from benchmarks.correctness.comparison import relative
from benchmarks.harness import account, contestants
from benchmarks.harness.cases import random_batch
from benchmarks.harness.contestants import FLASH, QUARTER
from benchmarks.harness.recipes import build, plain_operations
from soflow_fast import average_velocity
from soflow_fast.config.schema import FlowConfig, override
from soflow_fast.models.dit import TapedOutputs
from soflow_fast.training import step
from soflow_fast.training.state import TrainState
from soflow_fast.training.step import train_step
from tests.benchmarks import tiny

CONFIG = override(tiny.CONFIG, {"model.depth": 3})


def by_jvp(state: TrainState, at: At) -> torch.Tensor:
    return meanflow.jvp(state.flow.network, at)[1]


def at_random(state: TrainState) -> tuple[At, Student]:
    """Samples somewhere, and the student's forward there."""
    x0, y = random_batch(state.config, state.device)
    t = torch.linspace(0.5, 0.9, len(x0))
    at, tape = At(x0, t, t / 2, y, x0.flip(0)), TapedOutputs(slice(None))
    with torch.no_grad(), plain_operations():
        return at, Student(state.flow.network(at.z, at.t, at.r, at.y, tape=tape), tape)


def test_compiled_code_is_used_again(monkeypatch):
    """Two variants of a block, the first and the others; a third derivative needs no more."""
    counter = CompileCounter()
    compiled = torch.compile(dual.whole, backend=counter, fullgraph=True, dynamic=False)
    monkeypatch.setattr(dual, "compiled", lambda: dual.EAGER._replace(whole=compiled))
    state = build(QUARTER, CONFIG)
    at, student = at_random(state)
    with torch.no_grad(), plain_operations():
        for _ in range(3):
            found = meanflow.by_tangents(state, at, student, compiled=True)
            assert relative([found], [by_jvp(state, at)]) < 1e-5
    assert counter.frame_count == 2


@pytest.mark.parametrize("part", ["before", "after"])
def test_every_part_of_a_block_compiles_without_a_break(part, monkeypatch):
    compiled = torch.compile(getattr(dual, part), backend="eager", fullgraph=True, dynamic=False)
    monkeypatch.setattr(dual, "compiled", lambda: dual.EAGER._replace(**{part: compiled}))
    state = build(QUARTER, CONFIG)
    at, student = at_random(state)
    with torch.no_grad(), plain_operations():
        found = meanflow.by_tangents(state, at, student, compiled=True, attention=dual.composed)
        assert relative([found], [by_jvp(state, at)]) < 1e-5


def test_a_derivative_costs_one_forward():
    """A product for each layer, where torch.func.jvp makes three; attention makes five where a forward makes two, which
    on 16 tokens of 64 channels are 3 * 16 / (12 * 64 + 2 * 16) = 6 % of the forward. The rest is the conditioning."""
    config = override(CONFIG, {"model.hidden_size": 64, "model.input_size": 8})
    state = build(QUARTER, config)
    at, student = at_random(state)
    one = account.forward_flops(state, at.z)
    with torch.no_grad():
        tangents = account.flops(lambda: meanflow.by_tangents(state, at, student)) / one
        jvp = account.flops(lambda: by_jvp(state, at)) / one
    assert tangents == pytest.approx(1 + 3 * 16 / (12 * 64 + 2 * 16), abs=0.02)
    assert jvp == pytest.approx(3, abs=0.02)


def test_flash_jvp_takes_the_function_that_carries_tangents(monkeypatch):
    """A stand-in for the package, right at first, then one that drops the tangents without a word."""

    class JVPAttn:
        @staticmethod
        def fwd_dual(q, k, v, sm_scale):
            assert q.shape[-1] in dual.FLASH_HEADS, "filled up with zeros"
            return ((q * sm_scale) @ k.mT).softmax(-1) @ v

    right = JVPAttn.fwd_dual

    def dropping(q, k, v, sm_scale):
        return right(*(forward_ad.unpack_dual(value).primal for value in (q, k, v)), sm_scale)

    module = types.ModuleType("jvp_flash_attention.jvp_attention")
    module.JVPAttn = JVPAttn  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "jvp_flash_attention", types.ModuleType("jvp_flash_attention"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert FLASH.check is not None
    with torch.compiler.set_stance("force_eager"):
        errors = FLASH.check(override(CONFIG, {"precision": "bf16", "model.hidden_size": 64}), FLASH)
        assert errors["du/dt"] < 1e-5 and errors["du/dt in bf16"] < 2**-6
        monkeypatch.setattr(JVPAttn, "fwd_dual", staticmethod(dropping))
        with pytest.raises(AssertionError, match="lost the tangent"):
            FLASH.check(CONFIG, FLASH)


@pytest.mark.parametrize(
    ("precision", "quotient", "bound"),
    [("fp32", "pair", 5e-3), ("fp32", "increments", 2e-3), ("bf16", "auto", 2e-2)],
)
def test_the_engines_meanflow_is_the_published_one(precision, quotient, bound):
    """Losses and gradients of one step with its draws, where du/dt is of forward mode in float32 and of all samples."""
    changes = {"guidance_scale": 1.5, "mix_ratio": 0.25, "guidance_decay_time": 1.0, "fm_fraction": 0.75}
    changes = {f"objective.{name}": value for name, value in changes.items()} | {"objective": "meanflow"}
    config = override(CONFIG, {**changes, "precision": precision, "quotient": quotient, "batch_size": 8})
    engine = off_zero(TrainState.build(config))
    published = off_zero(meanflow.build(override(config, {"precision": "fp32"})))
    x0, y = random_batch(config, engine.device)
    x1, t, r, dropped, n = meanflow.draw(published, x0.shape, meanflow.Settings())
    l = torch.cat([t[:n], t[n:] - average_velocity.STEP])
    found = train_step(engine, x0, y, draws=step.Draws(x1, t, l, r, dropped, n))
    settings = meanflow.Settings()
    with plain_operations():
        wanted = meanflow.losses_as_published(published, x0, y, settings)
    for name in ("fm_mse", "sc_mse"):
        torch.testing.assert_close(found[name], wanted[name], rtol=bound, atol=0)
    share = n / len(x0)
    loss = share * found["fm_loss"] + (1 - share) * found["sc_loss"]
    torch.testing.assert_close(loss, wanted["loss"], rtol=bound, atol=0)
    gradients = [
        [p.grad.float() for p in sorted_parameters(state) if p.grad is not None] for state in (engine, published)
    ]
    assert relative(*gradients) < bound


def sorted_parameters(state: TrainState) -> list[torch.nn.Parameter]:
    return [p for _, p in sorted(state.flow.named_parameters())]


def off_zero(state: TrainState) -> TrainState:
    with torch.no_grad():
        weights = state.weights()
        for k, name in enumerate(sorted(weights)):
            weights[name] += 0.05 * torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(k))
        state.load_weights(weights)
    return state


def test_reasons():
    assert contestants.why_no_flash_jvp(CONFIG) is not None
    with pytest.raises(ValueError, match="linear path"):
        meanflow.build(replace(CONFIG, flow=FlowConfig(path="trig")))
