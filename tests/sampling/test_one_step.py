"""OneStep draws what `sample` draws, however it is made fast."""

import pytest
import torch

from soflow_fast import sample
from soflow_fast.errors import ConfigError
from soflow_fast.flow import SolutionFlow
from soflow_fast.sampling import OneStep
from soflow_fast.training import cuda_graph as capture
from tests.networks import network

pytestmark = [  # torch's own, while it compiles
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated"),
]


def given(B=3):
    source = torch.Generator().manual_seed(0)
    return torch.randn(B, 2, 8, 8, generator=source), torch.randint(6, (B,), generator=source)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-6), ("auto", 1e-6), ("bf16", 3e-2)])
def test_images_are_those_of_sample(precision, bound, labelled):
    noise, y = given()
    y = y if labelled else None
    wanted = sample(SolutionFlow(network()), y, noise=[noise])
    got = OneStep(SolutionFlow(network()), precision=precision)(noise, y)
    assert not got.requires_grad and got.dtype == torch.float32
    assert (got - wanted).norm() <= bound * wanted.norm()


def test_compiled(monkeypatch):
    compiled = type(network()).compile_blocks
    monkeypatch.setattr(type(network()), "compile_blocks", lambda net: compiled(net, "aot_eager"))
    noise, y = given()
    wanted = OneStep(SolutionFlow(network()))(noise, y)
    torch.testing.assert_close(OneStep(SolutionFlow(network()), compile=True)(noise, y), wanted)
    torch._dynamo.reset()


def test_refusals():
    with pytest.raises(ConfigError, match="cuda_graph: needs a GPU"):
        OneStep(SolutionFlow(network()), cuda_graph=True)
    with pytest.raises(ConfigError, match="tf32"):
        OneStep(SolutionFlow(network()), precision="tf32")
    with pytest.raises(ConfigError, match="fp8"):
        OneStep(SolutionFlow(network()), precision="fp8")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_recorded_on_a_gpu():
    noise, y = (value.cuda() for value in given())
    plain = OneStep(SolutionFlow(network()).cuda(), precision="bf16")
    recorded = OneStep(SolutionFlow(network()).cuda(), precision="bf16", cuda_graph=True)
    for _ in range(capture.WARM_UP + 3):
        noise = torch.randn_like(noise)
        torch.testing.assert_close(recorded(noise, y), plain(noise, y), rtol=1e-3, atol=1e-3)
    assert isinstance(recorded.call, capture.GraphedFunction) and recorded.call.replay is not None


def test_a_flow_of_many_steps_is_refused():
    with pytest.raises(ValueError, match="flow: was trained by flow-matching, whose samples take many calls"):
        OneStep(SolutionFlow(network(), objective="flow-matching"))
