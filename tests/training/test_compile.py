"""Compiled blocks: no graph breaks, the gradients of eager blocks, no recompilation once every size was seen."""

import dataclasses
import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from soflow_fast import ObjectiveConfig, TrainState, preset, train_step
from tests.networks import SIZES, gradients, inputs, network

pytestmark = [  # torch's own
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated"),
]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
BACKENDS = ["aot_eager", pytest.param("inductor", marks=[needs_compiler, pytest.mark.slow])]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("B", [1, 4])
def test_gradients_are_those_of_eager_blocks(B, backend):
    wanted = gradients(network(copies=torch.float32), B)
    net = network(copies=torch.float32)
    net.compile_blocks(backend)  # fullgraph: a break in the graph is an error
    got = gradients(net, B)
    for name, value in wanted.items():
        assert (got[name] - value).norm() <= 1e-5 * value.norm(), name
    with torch.no_grad():
        *given, _ = inputs(B)
        torch.testing.assert_close(net(*given), wanted["output"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recompute", ["none", "mlp", "block"])
def test_low_precision_gradients(recompute):
    wanted = gradients(network(rounded=torch.bfloat16), autocast=True)
    net = network(rounded=torch.bfloat16, recompute=recompute)
    net.compile_blocks("aot_eager")
    got = gradients(net, autocast=True)
    assert all(torch.equal(got[name], value) for name, value in wanted.items())


@pytest.mark.parametrize(
    "rounded", [pytest.param(None, marks=pytest.mark.slow), torch.bfloat16], ids=["float32", "bf16 parameters"]
)
def test_blocks_that_normalise_queries_and_keys(rounded):
    wanted = gradients(network(rounded=rounded, qk_norm=True), autocast=rounded is not None)
    net = network(rounded=rounded, qk_norm=True)
    net.compile_blocks("aot_eager")
    got = gradients(net, autocast=rounded is not None)
    for name, value in wanted.items():
        assert (got[name] - value).norm() <= 1e-5 * value.norm(), name


@pytest.mark.parametrize("fields", [{}, {"precision": "bf16"}, {"precision": "bf16", "teacher": "ema"}], ids=str)
def test_a_step_does_not_recompile(fields, monkeypatch):
    objective = ObjectiveConfig(teacher=fields.pop("teacher", "student"))
    config = preset("digits", device="cpu", batch_size=8, compile=True, **{"precision": "fp32", **fields})
    model = dataclasses.replace(SIZES, in_channels=1, num_classes=10)
    compiled = type(network()).compile_blocks
    monkeypatch.setattr(type(network()), "compile_blocks", lambda net: compiled(net, "aot_eager"))
    config = dataclasses.replace(config, model=model, objective=objective)
    run = TrainState.build(config)
    plain = TrainState.build(dataclasses.replace(config, run=dataclasses.replace(config.run, compile=False)))

    def step(k):
        source = torch.Generator().manual_seed(k)
        batch = torch.randn(8, 1, 8, 8, generator=source), torch.randint(10, (8,), generator=source)
        got, wanted = train_step(run, *batch), train_step(plain, *batch)
        torch.testing.assert_close(got["fm_mse"], wanted["fm_mse"], rtol=1e-3, atol=0)

    for k in range(2):
        step(k)
    made = counters["stats"]["unique_graphs"]
    assert made > 0 and not counters["graph_break"]
    for k in range(2, 10):
        step(k)
    assert counters["stats"]["unique_graphs"] == made
