"""Recorded steps: the numbers of steps that are not, and no look at the device's numbers from the host."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from soflow_fast import DiTConfig, ObjectiveConfig, TrainState, preset, train_step
from soflow_fast.errors import ConfigError
from soflow_fast.training import cuda_graph
from soflow_fast.training.cuda_graph import GraphedFunction
from soflow_fast.training.step import make_graph
from soflow_kernels import adamw

SIZES = DiTConfig(input_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=2, num_heads=2, num_classes=10)
aten = torch.ops.aten
HOST_READS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.is_nonzero.default)


class Recorder(TorchDispatchMode):
    """A CUDA graph on the CPU: notes operations with the tensors that they read and write, and makes the
    same operations on the same tensors again. A host read fails, as it would while a graph is recorded.

    A recording here runs what it notes, so the first replay is left out.
    """

    def __init__(self):
        super().__init__()
        self.noted, self.replays = [], 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert operation not in HOST_READS, f"{operation} waits for the device"
        out = operation(*args, **(kwargs or {}))
        self.noted.append((operation, args, kwargs or {}, out))
        return out

    def replay(self):
        self.replays += 1
        if self.replays == 1:
            return
        for operation, args, kwargs, before in self.noted:
            given = {place(t) for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
            out = operation(*args, **kwargs)
            for old, new in zip(*(torch.utils._pytree.tree_leaves(each) for each in (before, out)), strict=True):
                if isinstance(old, torch.Tensor) and place(old) not in given:
                    old.copy_(new)


def place(tensor):
    return tensor.untyped_storage().data_ptr()


@pytest.fixture
def graphs(monkeypatch):
    """Every recording that was made."""
    made = []

    def record(function):
        recorder = Recorder()
        made.append(recorder)
        with recorder:
            out = function()
        return lambda: torch.no_grad()(recorder.replay)(), out

    monkeypatch.setattr(cuda_graph, "record_graph", record)
    monkeypatch.setattr(adamw, "_on_host", lambda tensor: False)
    return made


def state(precision="fp32", teacher="student", **fields):
    config = preset("digits", precision=precision, device="cpu", batch_size=8, steps=40, **fields)
    objective = ObjectiveConfig(teacher=teacher)
    run = TrainState.build(dataclasses.replace(config, model=SIZES, objective=objective))
    with torch.no_grad():  # off the initial zeros, where half of the gradients vanish
        for i, p in enumerate(run.flow.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return run


def batch(seed=0, n=8):
    source = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 8, 8, generator=source), torch.randint(10, (n,), generator=source)


SETTINGS = [
    {"optim.warmup_steps": 20, "optim.lr": 1e-2, "optim.grad_clip": 1.0},  # rate, r and EMA decay change every step
    {"optim.lr": 1e-2, "optim.ema_warmup": True, "precision": "bf16"},
    {"optim.lr_schedule": "cosine", "teacher": "ema", "precision": "bf16", "optim.lr": 1e-2},
    {"micro_batch": 3, "optim.lr": 1e-2},
    {"optimizer": "torch", "optim.lr": 1e-2, "recompute": "mlp"},
    {"optimizer": "torch", "optim.lr": 1e-2, "precision": "bf16"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_recorded_steps_are_the_same_to_the_bit(settings, graphs):
    plain, recorded = state(**settings), state(**settings)
    make_graph(recorded)
    for group in plain.optimizer.param_groups:  # torch's own step multiplies numbers in float64, tensors in float32
        group["lr"] = torch.tensor(group["lr"])
    for seed in range(9):
        wanted, got = train_step(plain, *batch(seed)), train_step(recorded, *batch(seed))
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.equal(got[name], value), (seed, name)
    assert len(graphs) == 1 and graphs[0].replays == 6
    for name, of in (("flow", plain.flow), ("ema", plain.ema)):
        for p, q in zip(of.parameters(), getattr(recorded, name).parameters(), strict=True):
            assert torch.equal(p, q)
    one = next(iter(plain.optimizer.state_dict()["state"].values()))
    assert one["step"] == 9 == next(iter(recorded.optimizer.state_dict()["state"].values()))["step"]


def test_measured_quotients_and_other_batches_run_as_they_are(graphs):
    plain, recorded = (state(**{"run.check_quotient_every": 5, "precision": "bf16"}) for _ in range(2))
    make_graph(recorded)
    for seed in range(8):
        n = 6 if seed == 6 else 8
        wanted, got = train_step(plain, *batch(seed, n)), train_step(recorded, *batch(seed, n))
        assert ("q_cosine" in got) == (seed == 4)
        assert torch.equal(got["fm_mse"], wanted["fm_mse"]) and torch.equal(got["sc_mse"], wanted["sc_mse"])
    assert len(graphs) == 1 and graphs[0].replays == 3  # steps 4, 6 and 8: 1 to 3 warm up, 5 measures, 7 is of 6 images


def test_weights_that_somebody_loads_are_the_next_steps(graphs):
    plain, recorded, other = state("bf16"), state("bf16"), state("bf16")
    train_step(other, *batch(9))
    make_graph(recorded)
    for seed in range(8):
        if seed == 5:
            for run in (plain, recorded):
                run.flow.load_state_dict(other.flow.state_dict())
        wanted, got = train_step(plain, *batch(seed)), train_step(recorded, *batch(seed))
        assert torch.equal(got["fm_mse"], wanted["fm_mse"])


def test_returned_tensors_are_the_callers(graphs):
    double = GraphedFunction(lambda x: {"twice": (2 * x).sum()}, warm_up=1)
    results = [double(torch.full((2,), float(k)))["twice"] for k in range(4)]
    assert [float(value) for value in results] == [0, 4, 8, 12]
    single = GraphedFunction(lambda x, y: x + 1, warm_up=0)
    results = [single(torch.full((2,), float(k)), None) for k in range(3)]
    assert [float(value[0]) for value in results] == [1, 2, 3]


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16"}, {"precision": "bf16", "micro_batch": 3}], ids=str)
def test_a_step_reads_nothing_on_the_host(settings, monkeypatch):
    """Data come from the host, whose labels are looked at; from then on nothing waits for the device."""
    monkeypatch.setattr(adamw, "_on_host", lambda tensor: False)
    run = state(**settings, **{"run.check_quotient_every": 2})
    reads = []

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            if operation in HOST_READS:
                reads.append(operation)
            return operation(*args, **(kwargs or {}))

    for seed in range(2):  # the second one measures the quotient
        x0, _ = batch(seed)
        with Counter():
            train_step(run, x0, None)
        assert not reads
        with Counter():
            train_step(run, *batch(seed))
        assert reads == 2 * [aten._local_scalar_dense.default]  # least and largest label, on the host
        reads.clear()


def test_a_graph_without_a_gpu_is_refused():
    with pytest.raises(ConfigError, match=r"^--cuda-graph: needs a GPU, the device is cpu$"):
        state(cuda_graph=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recorded_steps_on_a_gpu(precision):
    config = preset("digits", precision=precision, device="cuda", batch_size=8, steps=40)
    plain, recorded = (
        TrainState.build(dataclasses.replace(config, model=SIZES, run=dataclasses.replace(config.run, cuda_graph=on)))
        for on in (False, True)
    )
    for seed in range(9):
        wanted, got = train_step(plain, *batch(seed)), train_step(recorded, *batch(seed))
        for name, value in wanted.items():
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert recorded.graph.replay is not None
