"""Recorded steps: the numbers of steps that are not, and no look at the device's numbers from the host."""

import contextlib
import copy
import dataclasses
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from soflow_fast import DiTConfig, ObjectiveConfig, TrainState, preset, train_step
from soflow_fast.errors import ConfigError, Interrupted
from soflow_fast.runs import trainer
from soflow_fast.runs.trainer import step_in_memory
from soflow_fast.training import cuda_graph
from soflow_fast.training.cuda_graph import GraphedFunction, why_not_graphed
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

    def record(function, stream):
        recorder = Recorder()
        made.append(recorder)
        with recorder:
            out = function()
        return lambda: torch.no_grad()(recorder.replay)(), out

    monkeypatch.setattr(cuda_graph, "record_graph", record)
    monkeypatch.setattr(adamw, "_on_host", lambda tensor: False)
    return made


def state(precision="fp32", teacher="student", qk_norm=False, guidance_range=None, **fields):
    config = preset("digits", precision=precision, device="cpu", batch_size=8, steps=40, **fields)
    objective = ObjectiveConfig(teacher=teacher)
    model = dataclasses.replace(SIZES, qk_norm=qk_norm, guidance_range=guidance_range)
    run = TrainState.build(dataclasses.replace(config, model=model, objective=objective))
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
    {"optim.lr": 1e-2, "qk_norm": True, "precision": "bf16"},
    {"optim.lr_schedule": "cosine", "teacher": "ema", "precision": "bf16", "optim.lr": 1e-2},
    {"micro_batch": 3, "optim.lr": 1e-2},
    {"optimizer": "torch", "optim.lr": 1e-2, "recompute": "mlp"},
    {"optimizer": "torch", "optim.lr": 1e-2, "precision": "bf16"},
    {"optim.lr": 1e-2, "precision": "bf16", "guidance_range": (1.0, 4.0)},
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
        assert seed != 4 or torch.equal(got["q_cosine"], wanted["q_cosine"])
        assert torch.equal(got["fm_mse"], wanted["fm_mse"]) and torch.equal(got["sc_mse"], wanted["sc_mse"])
    assert len(graphs) == 1 and graphs[0].replays == 4  # steps 4, 5, 6 and 8: 1 to 3 warm up, 7 is of 6 images


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


def test_layers_that_are_watched_are_called_in_every_step(graphs):
    """A replay would not call a hook, and not see that it is gone."""
    plain, recorded = state(precision="bf16"), state(precision="bf16")
    make_graph(recorded)
    heard = []
    for seed in range(9):
        if seed == 5:
            handles = [
                run.flow.network.blocks[0].mlp.register_forward_hook(hook(heard, run)) for run in (plain, recorded)
            ]
        if seed == 7:
            for handle in handles:
                handle.remove()
        wanted, got = train_step(plain, *batch(seed)), train_step(recorded, *batch(seed))
        for name in wanted:
            assert torch.equal(got[name], wanted[name]), (seed, name)
    assert heard.count(plain) == heard.count(recorded) > 0
    assert len(graphs) == 1 and graphs[0].replays == 4  # steps 4, 5, 8 and 9


def hook(heard, run):
    def double(module, given, out):
        heard.append(run)
        return 2 * out

    return double


def test_a_function_that_cannot_be_recorded_runs_as_it_is(monkeypatch):
    def refuse(function, stream):
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors ...")

    monkeypatch.setattr(cuda_graph, "record_graph", refuse)
    plain, recorded = state(), state()
    make_graph(recorded)
    for seed in range(6):
        wanted, got = train_step(plain, *batch(seed)), train_step(recorded, *batch(seed))
        assert torch.equal(got["fm_loss"], wanted["fm_loss"])
        assert (recorded.graph.fault is not None) == (seed >= 3)
    assert recorded.graph.fault == "operation not permitted when stream is capturing"
    for p, q in zip(plain.flow.parameters(), recorded.flow.parameters(), strict=True):
        assert torch.equal(p, q)


def test_memory_that_a_recording_lacks_gives_up_the_recording_first(monkeypatch):
    """And only then the size of the micro-batch."""
    scarce, said = [True], []

    def refuse(function, stream):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cuda_graph, "record_graph", refuse)
    plain, run = state(), state()
    run.graphed = True
    for seed in range(6):
        wanted, got = train_step(plain, *batch(seed)), step_in_memory(run, *batch(seed), said.append)
        assert torch.equal(got["grad_norm"], wanted["grad_norm"])
    assert said == ["out of memory at step 4: again, without a CUDA graph"]
    assert run.config.micro_batch == 0 and not run.graphed and run.graph is None
    # As it is, it runs out as well.
    real = trainer.train_step

    def short(state, x0, y):
        if scarce.pop() if scarce else False:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(state, x0, y)

    monkeypatch.setattr(trainer, "train_step", short)
    step_in_memory(run, *batch(7), said.append)
    assert said[1:] == ["out of memory at step 7: again, in micro-batches of 4"] and run.config.micro_batch == 4


class OnSecondGpu(torch.Tensor):
    """A tensor that says it is on cuda:1."""

    device = torch.device("cuda", 1)


class FakeCuda:
    """torch.cuda as a recording sees it: which device is current, and the stream on which each thing happens."""

    def __init__(self):
        self.device, self.streams, self.made, self.captures, self.replays, self.calls = (
            0,
            {0: "0", 1: "1"},
            0,
            [],
            [],
            [],
        )

    @contextlib.contextmanager
    def on(self, device):
        before, self.device = self.device, torch.device(device).index
        yield
        self.device = before

    def stream(self, stream):
        cuda, before = self, []

        class Context:  # none of contextlib's, which would also end when nobody ends it
            def __enter__(self):
                before.append(cuda.streams[stream.index])
                cuda.streams[stream.index] = stream

            def __exit__(self, *error):
                cuda.streams[stream.index] = before.pop()

        return Context()

    @contextlib.contextmanager
    def graph(self, graph, pool=None, stream=None, capture_error_mode="global"):
        index = self.device if stream is None else stream.index
        assert stream is None or index == self.device, "a stream of another device than the current one"
        self.captures.append((self.device, stream))
        with self.stream(stream):
            yield


def here(cuda):
    return cuda.device, cuda.streams[cuda.device]


def test_everything_happens_on_the_device_and_on_one_stream(monkeypatch):
    """Of cuda:1 while cuda:0 is current: a recording made elsewhere would be empty, and warm-ups on streams of their
    own would each keep a pool of memory."""
    cuda = FakeCuda()

    class Stream:
        def __init__(self, device):
            cuda.made += 1
            self.index = torch.device(device).index

        def wait_stream(self, other):
            pass

    class Graph:
        def replay(self):
            cuda.replays.append(here(cuda))

    default = Stream("cuda:1")
    cuda.made, cuda.streams[1] = 0, default
    for name, value in (
        ("device", cuda.on), ("stream", cuda.stream), ("graph", cuda.graph), ("Stream", Stream), ("CUDAGraph", Graph),
        ("current_stream", lambda device=None: cuda.streams[torch.device(device).index]),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)

    def function(x):
        cuda.calls.append(here(cuda))
        return torch.ones(3)

    graphed = GraphedFunction(function)
    for k in range(6):
        graphed(torch.full((2,), float(k)).as_subclass(OnSecondGpu))
    assert cuda.made == 1
    side = cuda.calls[0][1]
    assert side is not default
    assert cuda.calls == [(1, side)] * 4  # three warm-ups and the recording
    assert cuda.captures == [(1, side)] and cuda.replays == [(1, default)] * 3
    assert cuda.device == 0


@pytest.mark.parametrize("kind", [RuntimeError, torch.OutOfMemoryError])
def test_a_recording_that_fails_leaves_the_stream_and_says_why(kind, monkeypatch):
    """torch's own class around a graph whose end fails, as it does once an operation was not permitted."""

    class Graph:
        def capture_begin(self, *pool, **options):
            assert options["capture_error_mode"] == "thread_local"

        def capture_end(self):
            raise RuntimeError("operation failed due to a previous error during capture")

    cuda = FakeCuda()
    for name, value in (("synchronize", lambda: None), ("empty_cache", lambda: None), ("CUDAGraph", Graph)):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    monkeypatch.setattr(torch.cuda, "stream", cuda.stream)
    side = SimpleNamespace(index=0)

    def function():
        assert here(cuda) == (0, side)
        raise kind("not permitted when stream is capturing")

    with pytest.raises(kind, match=r"^not permitted") as raised:
        cuda_graph.record_graph(function, side)
    assert raised.value.__cause__ is None and here(cuda) == (0, "0")
    with pytest.raises(RuntimeError, match=r"^operation failed"):
        cuda_graph.record_graph(lambda: here(cuda), side)
    assert here(cuda) == (0, "0")


@pytest.mark.parametrize("kind", [RuntimeError, torch.OutOfMemoryError])
def test_nothing_of_a_failed_recording_is_kept(kind, monkeypatch):
    """Neither while the function runs as it is, nor for whoever catches that memory ran out."""

    class Failing:
        def __init__(self, *given, **options):
            pass

        def __enter__(self):
            recording.append(True)

        def __exit__(self, *error):
            recording.clear()
            raise RuntimeError("operation failed due to a previous error during capture")

    recording, made, alive = [], [], []
    monkeypatch.setattr(torch.cuda, "graph", Failing)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())

    def function(x):
        activation = x + 1
        if recording:
            made.append(weakref.ref(activation))
            raise kind("not permitted")
        alive.extend(ref() is not None for ref in made)
        return activation

    graphed = GraphedFunction(function, warm_up=0)
    gc.disable()
    try:
        if kind is RuntimeError:
            assert torch.equal(graphed(torch.zeros(2)), torch.ones(2)) and graphed.fault == "not permitted"
        else:
            with pytest.raises(kind):
                graphed(torch.zeros(2))
            alive.extend(ref() is not None for ref in made)
    finally:
        gc.enable()
    assert alive == [False]


def test_an_interruption_is_no_fault_of_the_recording(monkeypatch):
    class Failing(contextlib.nullcontext):
        def __exit__(self, *error):
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "graph", lambda *given, **options: Failing())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())

    def function(x):
        raise Interrupted(15, at_once=True)

    with pytest.raises(Interrupted):
        GraphedFunction(function, warm_up=0)(torch.zeros(2))


def test_a_recording_begins_without_gradients(graphs, monkeypatch):
    """It has memory of its own for them, beside which those of the last step before it would stay."""
    run, before = state(), []
    record = cuda_graph.record_graph

    def noted(function, stream):
        before.append([p.grad for p in run.flow.parameters()])
        return record(function, stream)

    monkeypatch.setattr(cuda_graph, "record_graph", noted)
    make_graph(run)
    for seed in range(5):
        train_step(run, *batch(seed))
        assert any(p.grad is not None for p in run.flow.parameters())
    assert len(before) == 1 and not any(grad is not None for grad in before[0])


def test_layers_of_the_forward_behind_guidance_are_watched_too():
    run = state("bf16")
    run.guide = copy.deepcopy(run.flow)
    assert not run.watched()
    handle = run.guide.network.blocks[0].mlp.register_forward_hook(lambda *given: None)
    assert run.watched()
    handle.remove()
    assert not run.watched()


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({}, None),
        ({"compile": True}, "the blocks are compiled"),
        ({"optimizer": "apex"}, "the optimiser is apex's"),
        ({"precision": "fp8"}, "float8 products are torchao's"),
        ({"guidance_precision": "fp8"}, "float8 products are torchao's"),
    ],
    ids=str,
)
def test_a_step_is_recorded_by_default_where_all_of_it_can_be(fields, why, monkeypatch):
    config = preset("digits", precision=fields.pop("precision", "bf16"), **fields)
    monkeypatch.setattr(torch.version, "hip", None)
    assert why_not_graphed(config, config.precision, torch.device("cuda")) == why
    assert why_not_graphed(config, config.precision, torch.device("cpu")) == "the device is cpu"
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert why_not_graphed(config, config.precision, torch.device("cuda")) == "the GPU is not NVIDIA's"


@pytest.mark.parametrize(
    ("asked", "possible", "graphed"), [(None, True, True), (None, False, False), (False, True, False)]
)
def test_the_default_is_left_to_the_machine(asked, possible, graphed, monkeypatch):
    monkeypatch.setattr("soflow_fast.training.state.why_not_graphed", lambda *given: None if possible else "no")
    assert state(cuda_graph=asked).graphed == graphed


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
