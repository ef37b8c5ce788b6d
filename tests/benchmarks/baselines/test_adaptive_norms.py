"""Other people's adaptive layer norms, by stand-ins with the signatures that the packages have."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.baselines import adaptive_norms, norms
from benchmarks.harness import operations
from benchmarks.harness.kernel_race import KernelRace
from benchmarks.harness.operations import EAGER, OURS
from tests.benchmarks.tiny import CPU
from tests.benchmarks.tiny import SIZES as TINY


class Place:
    """A tensor of a graph."""

    def __init__(self, **facts):
        self.facts, self.output = facts, False

    def set_output(self, on):
        self.output = on
        return self

    def set_data_type(self, kind):
        self.facts["data_type"] = kind
        return self


class Graph:
    """cuDNN's graph with one node, as `cudnn.pygraph` is called; it computes on the CPU what cuDNN documents."""

    def __init__(self, *, handle, intermediate_data_type, compute_data_type):
        assert handle == "handle" and intermediate_data_type == compute_data_type == torch.float32
        self.built = False

    def tensor(self, *, name, dim, stride, data_type, is_pass_by_value):
        assert len(dim) == len(stride) == 3 and is_pass_by_value == (name == "epsilon")
        return Place(name=name, dim=dim, data_type=data_type)

    def adalayernorm(self, *, name, norm_forward_phase, input, scale, bias, epsilon):
        self.inputs, self.phase = (input, scale, bias, epsilon), norm_forward_phase
        training = norm_forward_phase == "training"
        self.outputs = [Place(), *(Place() if training else None for _ in range(2))]
        return self.outputs

    def adalayernorm_backward(self, *, name, grad, input, scale, mean, inv_variance):
        self.inputs, self.phase = (grad, input, scale, mean, inv_variance), "backward"
        self.outputs = [Place() for _ in range(3)]
        return self.outputs

    def build(self, modes):
        assert modes == ["A", "FALLBACK"] and all(place.output for place in self.outputs if place is not None)
        self.built = True

    def get_workspace_size(self):
        return 0

    def execute(self, values, workspace, *, handle):
        assert self.built and handle == "handle" and workspace.dtype == torch.uint8
        given = [values[place] for place in self.inputs]
        for place, value in zip(self.inputs, given, strict=True):
            assert tuple(value.shape) == tuple(place.facts["dim"]) and value.is_contiguous()
            assert value.dtype == place.facts["data_type"]
        if self.phase == "backward":
            grad, x, scale, mean, inverse = (value.double() for value in given)
            h = (x - mean) * inverse
            dh = grad * scale
            dx = inverse * (dh - dh.mean(-1, keepdim=True) - h * (dh * h).mean(-1, keepdim=True))
            found = [dx, (grad * h).sum(1, keepdim=True), grad.sum(1, keepdim=True)]
        else:
            x, scale, bias, epsilon = (value.double() for value in given)
            mean = x.mean(-1, keepdim=True)
            inverse = (x.var(-1, correction=0, keepdim=True) + epsilon).rsqrt()
            found = [(x - mean) * inverse * scale + bias, mean, inverse]
        for place, value in zip(self.outputs, found, strict=True):
            if place in values:
                assert values[place].dtype == place.facts["data_type"]
                values[place].copy_(value)


def cudnn() -> SimpleNamespace:
    kinds = {"BFLOAT16": torch.bfloat16, "HALF": torch.float16, "FLOAT": torch.float32}
    return SimpleNamespace(
        pygraph=Graph,
        data_type=SimpleNamespace(**kinds),
        norm_forward_phase=SimpleNamespace(TRAINING="training", INFERENCE="inference"),
        heur_mode=SimpleNamespace(A="A", FALLBACK="FALLBACK"),
        create_handle=lambda: "handle",
        set_stream=lambda *, handle, stream: None,
    )


class AdaptiveLayerNorm:
    """`transformer_engine.pytorch.ops.AdaptiveLayerNorm`: scale comes before shift."""

    def __init__(self, hidden_size, *, eps=1e-5, batch_dim=0):
        self.hidden_size, self.eps = hidden_size, eps

    def __call__(self, x, scale, shift):
        h = torch.nn.functional.layer_norm(x.float(), (self.hidden_size,), eps=self.eps)
        return (h * (1 + scale.float().unsqueeze(1)) + shift.float().unsqueeze(1)).to(x.dtype)


@pytest.fixture
def packages(monkeypatch):
    """Both are installed, and nothing else."""
    found = {"cudnn": cudnn(), "transformer_engine.pytorch.ops": SimpleNamespace(AdaptiveLayerNorm=AdaptiveLayerNorm)}

    def load(name):
        if name not in found:
            raise ImportError("elsewhere")
        return found[name]

    monkeypatch.setattr(norms.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(norms.importlib, "import_module", load)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    return found


NAMES = {"cuDNN adaptive", "TransformerEngine adaptive"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adaptive_norms_pass_the_gate_of_both_operations(packages, dtype):
    raced = [op for op in operations.operations(torch.device("cuda")) if NAMES & set(op.others)]
    assert [op.name for op in raced] == ["layernorm_modulate", "gate_residual_layernorm_modulate"]
    for operation in raced:
        for backward in (False, True):
            race = KernelRace(operation, backward, TINY, CPU, dtype)
            assert set(race.timer.calls) == {OURS, EAGER, *NAMES}, race.rows


def test_one_that_computes_something_else_is_not_timed(packages, monkeypatch):
    """A scale taken for a shift, and a factor that lacks its 1."""
    swapped = lambda self, x, shift, scale: plain(self, x, scale, shift)  # noqa: E731
    plain = AdaptiveLayerNorm.__call__
    monkeypatch.setattr(AdaptiveLayerNorm, "__call__", swapped)
    node = Graph.adalayernorm

    def other(self, *, scale, bias, **named):
        return node(self, scale=bias, bias=scale, **named)

    monkeypatch.setattr(Graph, "adalayernorm", other)
    (operation,) = (op for op in operations.operations(torch.device("cuda")) if op.name == "layernorm_modulate")
    race = KernelRace(operation, True, TINY, CPU)
    why = {row["way"]: row["why_not"] for row in race.rows}
    assert all(f"{name} against float64" in why[name] for name in NAMES)


def test_graphs_are_made_once_for_a_shape(packages):
    built = []

    class Counted(Graph):
        def build(self, modes):
            built.append(self.phase)
            super().build(modes)

    packages["cudnn"].pygraph = Counted
    norm = adaptive_norms.adaptive_norms(torch.device("cuda"))["cuDNN adaptive"]
    assert not isinstance(norm, str)
    for shape in ((2, 3, 8), (2, 3, 8), (1, 3, 8)):
        norm(torch.randn(shape), *(torch.randn(shape[0], 8) for _ in range(2)))
    assert built == ["inference", "training", "backward"] * 2


def test_why_they_are_not_here(packages, monkeypatch):
    device = torch.device("cuda")
    assert adaptive_norms.adaptive_norms(CPU) == {
        "cuDNN adaptive": "nvidia-cudnn-frontend needs a GPU",
        "TransformerEngine adaptive": "transformer-engine needs a GPU",
    }
    packages["cudnn"].pygraph = object
    del packages["transformer_engine.pytorch.ops"].AdaptiveLayerNorm
    old = adaptive_norms.adaptive_norms(device)
    assert "no such thing" in str(old["cuDNN adaptive"]) and "adalayernorm" in str(old["cuDNN adaptive"])
    said = str(old["TransformerEngine adaptive"])
    assert said.startswith("this version of transformer-engine has no such thing") and "AdaptiveLayerNorm" in said
    packages.clear()
    assert "cannot be imported: elsewhere" in str(adaptive_norms.adaptive_norms(device)["cuDNN adaptive"])
    monkeypatch.setattr(norms.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in str(adaptive_norms.adaptive_norms(device)["cuDNN adaptive"])
