"""Other people's optimisers, by a stand-in with the signature that the package has."""

from enum import Enum
from types import SimpleNamespace

import pytest
import torch

from benchmarks.baselines import norms, optimizers
from benchmarks.harness import operations
from benchmarks.harness.kernel_race import KernelRace
from benchmarks.harness.operations import EAGER, OURS
from tests.benchmarks.tiny import CPU
from tests.benchmarks.tiny import SIZES as TINY


class AdamMathType(Enum):
    ApexAdam = 0
    ApexAdamW = 1
    PyTorchAdam = 2


class FusedAdamSWA:
    """apex.contrib.openfold_triton.fused_adam_swa.FusedAdamSWA: gradients are those of the copies, and must have their
    dtype; the first average is a copy of the parameters."""

    decay_sign = 1

    def __init__(
        self, params, compute_params, swa_params, swa_decay_rate, lr=1e-3, bias_correction=True, betas=(0.9, 0.999),
        eps=1e-8, adam_math_mode=AdamMathType.PyTorchAdam, weight_decay=0.0,
    ):  # fmt: skip
        assert adam_math_mode is AdamMathType.ApexAdamW, "the others add the decay to the gradient"
        assert all(type(x) is list for x in (params, compute_params, swa_params))
        group = {"params": params, "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        self.param_groups, self.state = [group], {}
        self.compute_param_groups = [{"params": compute_params}]
        self.swa_param_groups = [{"params": swa_params, "n_averaged": 0}]
        self.swa_decay_rate = swa_decay_rate

    def step(self):
        (group,), (copies,), (averages,) = self.param_groups, self.compute_param_groups, self.swa_param_groups
        group["step"] = group.get("step", 0) + 1
        b1, b2 = group["betas"]
        sets = zip(group["params"], copies["params"], averages["params"], strict=True)
        for p, copy, average in sets:
            assert copy.grad.dtype == copy.dtype
            m, v, g = self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"], copy.grad.to(p.dtype)
            m.mul_(b1).add_(g, alpha=1 - b1)
            v.mul_(b2).addcmul_(g, g, value=1 - b2)
            move = (m / (1 - b1 ** group["step"])) / ((v / (1 - b2 ** group["step"])).sqrt() + group["eps"])
            new = p - group["lr"] * (move + group["weight_decay"] * p)
            p.copy_(new)
            copy.copy_(new)
            averaged = average + (1 - self.swa_decay_rate) * (new - average)
            average.copy_(averaged if averages["n_averaged"] else new)
        averages["n_averaged"] += 1


@pytest.fixture
def apex(monkeypatch):
    module = SimpleNamespace(FusedAdamSWA=FusedAdamSWA, AdamMathType=AdamMathType)

    def load(name):
        if name != "apex.contrib.openfold_triton.fused_adam_swa":
            raise ImportError("elsewhere")
        return module

    monkeypatch.setattr(norms.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(norms.importlib, "import_module", load)
    return module


def raced() -> list[operations.Operation]:
    return [op for op in operations.operations(torch.device("cuda")) if "apex FusedAdamSWA" in op.others]


def test_it_passes_the_gate_with_and_without_copies(apex):
    assert [op.name for op in raced()] == ["adamw_ema", "adamw_ema, bfloat16 gradients and copies"]
    for operation in raced():
        race = KernelRace(operation, False, TINY, CPU)
        assert set(race.timer.calls) == {OURS, EAGER, "apex FusedAdamSWA"}, race.rows
        race.timer.round()  # and again, on what the first has left


def test_one_that_does_something_else_is_not_timed(apex):
    class Wrong(FusedAdamSWA):
        def step(self):
            self.swa_param_groups[0]["n_averaged"] = 0
            super().step()

    apex.FusedAdamSWA = Wrong
    for operation in raced():
        race = KernelRace(operation, False, TINY, CPU)
        assert "apex FusedAdamSWA" not in race.timer.calls
        (why,) = (row["why_not"] for row in race.rows if row["way"] == "apex FusedAdamSWA")
        assert "against float64: emas" in why


def test_why_it_is_not_here(apex, monkeypatch):
    assert optimizers.optimizers(CPU) == {"apex FusedAdamSWA": "apex needs a GPU"}
    del apex.AdamMathType
    assert "no such thing" in str(optimizers.optimizers(torch.device("cuda"))["apex FusedAdamSWA"])
    monkeypatch.setattr(norms.importlib.util, "find_spec", lambda name: None)
    assert optimizers.optimizers(torch.device("cuda")) == {"apex FusedAdamSWA": "apex is not installed"}
