"""The choice between our kernels and quack for the products of an MLP, and what is said about it."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from soflow_fast.config.presets import preset
from soflow_fast.config.schema import override
from soflow_fast.errors import ConfigError
from soflow_fast.models import mlp_autotune, mlp_products
from soflow_fast.models.mlp_autotune import Case, Choice, Shape, choose, compare, remembered
from soflow_fast.models.mlp_products import KERNELS, MLPProducts
from soflow_fast.runs import trainer
from soflow_fast.training.state import TrainState
from tests import fake_quack

CPU, LOW = torch.device("cpu"), torch.bfloat16
SHAPE = Shape(100, 32, 64)


class Bench:
    """A clock that both ways move by their costs, and the stand-in of quack."""

    def __init__(self, quack: fake_quack.FakeQuack) -> None:
        self.now, self.quack = 0.0, quack
        self.costs = {"kernels": (2.0, 3.0), "quack": (1.0, 2.0)}
        self.calls: list[str] = []

    def clock(self) -> float:
        return self.now

    def products(self, name: str, x: torch.Tensor, dtype: torch.dtype) -> MLPProducts:
        found = mlp_products.mlp_products(name, x, dtype)

        def at_cost(function: Callable[..., Any], cost: float) -> Callable[..., Any]:
            def call(*given: torch.Tensor) -> Any:
                self.calls.append(name)
                self.now += cost
                return function(*given)

            return call

        forward, backward = self.costs[name]
        return found._replace(forward=at_cost(found.forward, forward), backward=at_cost(found.backward, backward))


@pytest.fixture
def bench(monkeypatch: Any) -> Bench:
    """Both ways on the CPU, timed by a clock of ours, as if quack could be used there."""
    made = Bench(fake_quack.put_in_place(monkeypatch))
    monkeypatch.setattr(mlp_autotune, "mlp_products", made.products)
    monkeypatch.setattr(mlp_autotune, "why_not", lambda *given: None)
    return made


def test_the_faster_one_is_chosen_and_its_times_are_said(bench: Bench) -> None:
    found = compare(CPU, LOW, SHAPE, bench.clock)
    assert found.seconds == {"kernels": 5, "quack": 3} and found.passed_over == {}
    assert found.choice() == Choice("quack", "MLP by quack (kernels 5e+03 ms; quack 3e+03 ms)")
    bench.costs["quack"] = (1.0, 5.0)
    assert compare(CPU, LOW, SHAPE, bench.clock).choice().name == "kernels"


@pytest.mark.parametrize(
    ("factor", "what"),
    [
        ("u", "first product"),
        ("inner", "result"),
        ("du", "gradient"),
        ("again", "result in the backward"),
    ],
)
def test_a_quack_that_is_wrong_is_passed_over_and_says_why(factor: str, what: str, bench: Bench) -> None:
    bench.quack.factors[factor] = 1.03
    found = compare(CPU, LOW, SHAPE, bench.clock)
    assert list(found.seconds) == ["kernels"]
    assert found.choice().name == "kernels"
    assert f"; quack: its {what} is wrong: relative error 3." in found.choice().said
    bench.quack.factors[factor] = float("nan")
    assert "relative error nan" in compare(CPU, LOW, SHAPE, bench.clock).choice().said


def test_a_wrong_sum_over_rows_is_seen(monkeypatch: Any) -> None:
    def wrong(*given: torch.Tensor) -> Any:
        du, db1, inner = KERNELS.backward(*given)
        return du, db1 + du[0], inner

    monkeypatch.setattr(mlp_autotune, "mlp_products", lambda *given: KERNELS._replace(backward=wrong))
    fault = Case(CPU, LOW, SHAPE).fault("quack")
    assert fault is not None and fault.startswith("its bias gradient is wrong")


@pytest.mark.parametrize("rows", [1, 2, 64, 65, 1000])
def test_right_ones_pass_at_any_number_of_rows(rows: int, bench: Bench) -> None:
    case = Case(CPU, LOW, Shape(rows, 32, 64))
    assert {0, rows - 1} <= set(case.checked.tolist()) and len(set(case.checked.tolist())) == min(rows, 64)
    assert case.fault("kernels") is None and case.fault("quack") is None


def test_a_quack_that_raises_is_passed_over_and_says_why(bench: Bench) -> None:
    bench.quack.error = RuntimeError("no kernel image\nfor this GPU")
    found = compare(CPU, LOW, SHAPE, bench.clock).choice()
    assert found == Choice("kernels", "MLP by kernels (kernels 5e+03 ms; quack: no kernel image)")


def test_nothing_left_is_our_kernels(bench: Bench, monkeypatch: Any) -> None:
    def raises(*given: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Case, "seconds", raises)
    assert compare(CPU, LOW, SHAPE, bench.clock).choice().name == "kernels"
    monkeypatch.setattr(Case, "__init__", raises)
    found = compare(CPU, LOW, SHAPE, bench.clock)
    assert found.passed_over == {"kernels": "out of memory", "quack": "out of memory"}
    assert found.choice().name == "kernels"


# In a CUDA graph


class Recorder:
    """Records as a CUDA graph does: the function's results lie in one place, and a replay writes them there."""

    def __init__(self, spoil: int = 0) -> None:
        self.recorded, self.replays, self.spoil = 0, 0, spoil

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.recorded += 1
        values = function()
        places = tuple(value.clone().fill_(7) for value in values)

        def replay() -> None:
            self.replays += 1
            for place, value in zip(places, values, strict=True):
                place.copy_(value if self.replays != self.spoil else 2 * value)

        return replay, places


def test_a_step_that_is_a_graph_tries_both_as_graphs(bench: Bench) -> None:
    record = Recorder()
    assert compare(CPU, LOW, SHAPE, bench.clock, record).passed_over == {}
    assert (record.recorded, record.replays) == (2, 4)


@pytest.mark.parametrize("spoilt", [1, 2])
def test_a_replay_that_is_wrong_is_seen(spoilt: int, bench: Bench) -> None:
    fault = Case(CPU, LOW, SHAPE).fault("quack", Recorder(spoilt))
    assert fault == "its first product is wrong: relative error 1.0e+00, in a CUDA graph"


def test_what_a_replay_does_not_write_is_seen(bench: Bench) -> None:
    def record(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        return (lambda: None), function()

    assert "relative error nan, in a CUDA graph" in (Case(CPU, LOW, SHAPE).fault("quack", record) or "")


def test_one_that_cannot_be_recorded_is_passed_over(bench: Bench) -> None:
    def record(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        if bench.calls[-1] == "quack":
            raise RuntimeError("operation not permitted when stream is capturing")
        return Recorder()(function)

    found = compare(CPU, LOW, SHAPE, bench.clock, record)
    assert found.passed_over == {"quack": "operation not permitted when stream is capturing"}


# What is kept


def test_the_choice_is_kept_by_shape_and_kind_of_step(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "new" / "mlp.json"
    first = remembered(CPU, LOW, SHAPE, bench.clock, path, None)
    bench.costs["quack"], tried = (9.0, 9.0), len(bench.calls)
    assert remembered(CPU, LOW, SHAPE, bench.clock, path, None) == first and len(bench.calls) == tried
    assert remembered(CPU, LOW, SHAPE._replace(rows=50), bench.clock, path, None).name == "kernels"
    assert remembered(CPU, LOW, SHAPE, bench.clock, path, Recorder()).name == "kernels"
    keys = list(json.loads(path.read_text()))
    assert len(keys) == 3 and keys[2].endswith("rows=100 width=32 inner=64; CUDA graph")
    assert all(
        part in keys[0] for part in (torch.__version__, "bfloat16", "quack-kernels", "rows=100 width=32 inner=64")
    )


@pytest.mark.parametrize("entry", [3, {}, {"kernels": 1.0}, {"kernels": 1.0, "quack": "2"}, {"kernels": 1.0, "b": 2.0}])
def test_a_damaged_entry_is_measured_anew(entry: Any, bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "mlp.json"
    remembered(CPU, LOW, SHAPE, bench.clock, path, None)
    (key,) = json.loads(path.read_text())
    path.write_text(json.dumps({key: entry}))
    bench.calls.clear()
    assert remembered(CPU, LOW, SHAPE, bench.clock, path, None).name == "quack" and bench.calls


def test_a_quack_that_failed_is_tried_again_at_the_next_start(bench: Bench, tmp_path: Path) -> None:
    path, bench.quack.error = tmp_path / "mlp.json", RuntimeError("no memory")
    assert remembered(CPU, LOW, SHAPE, bench.clock, path, None).name == "kernels" and not path.exists()
    bench.quack.error = None
    assert remembered(CPU, LOW, SHAPE, bench.clock, path, None).name == "quack" and path.exists()


# What is asked for


def test_auto_is_our_kernels_without_a_word_where_quack_cannot_be_used(bench: Bench, monkeypatch: Any) -> None:
    assert choose("kernels", CPU, LOW, SHAPE, bench.clock) == Choice("kernels")
    assert choose("auto", CPU, LOW, SHAPE, bench.clock, unfit="the blocks are compiled") == Choice("kernels")
    monkeypatch.setattr(mlp_autotune, "why_not", lambda *given: "needs bf16")
    assert choose("auto", CPU, LOW, SHAPE, bench.clock) == Choice("kernels")
    assert bench.calls == []


def test_auto_tries_both_where_it_can(bench: Bench, tmp_path: Path) -> None:
    assert choose("auto", CPU, LOW, SHAPE, bench.clock, tmp_path / "mlp.json").name == "quack"
    assert choose("auto", CPU, LOW, SHAPE, bench.clock, tmp_path / "a.json", record=Recorder()).name == "quack"


def test_a_quack_that_was_asked_for_is_tried_out_and_not_timed(bench: Bench, monkeypatch: Any) -> None:
    assert choose("quack", CPU, LOW, SHAPE, bench.clock) == Choice("quack")
    assert bench.calls == ["quack"] * 2
    bench.quack.factors["du"] = 0.9
    with pytest.raises(ConfigError, match=r"^run\.mlp quack: its gradient is wrong: relative error 1\."):
        choose("quack", CPU, LOW, SHAPE, bench.clock)
    with pytest.raises(ConfigError, match=r"^run\.mlp quack: the blocks are compiled$"):
        choose("quack", CPU, LOW, SHAPE, bench.clock, unfit="the blocks are compiled")
    bench.quack.factors.clear()
    with pytest.raises(ConfigError, match=r"^run\.mlp quack: .*, in a CUDA graph$"):
        choose("quack", CPU, LOW, SHAPE, bench.clock, record=Recorder(spoil=2))
    monkeypatch.setattr(mlp_autotune, "why_not", lambda *given: "needs an NVIDIA GPU")
    with pytest.raises(ConfigError, match=r"^run\.mlp quack: needs an NVIDIA GPU$"):
        choose("quack", CPU, LOW, SHAPE, bench.clock)


# The run

TINY = {"model.hidden_size": 16, "model.depth": 2, "model.num_heads": 2, "device": "cpu", "steps": 2}


def build(**changes: Any) -> TrainState:
    return TrainState.build(trainer.resolved(override(preset("digits"), TINY | changes)))


@pytest.mark.parametrize(("micro", "B"), [(0, 24), (8, 8), (99, 24)])
def test_the_choice_is_for_the_shape_of_the_run(micro: int, B: int, monkeypatch: Any) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(mlp_autotune, "choose", lambda *given, **more: asked.append((*given, more)) or Choice("quack"))
    state = build(precision="bf16", micro_batch=micro, batch_size=24)
    assert trainer.resolve_mlp(state) == Choice("quack")
    tokens = (state.config.model.input_size // state.config.model.patch_size) ** 2
    given = ("auto", CPU, LOW, Shape(B * tokens, 16, 64), trainer.time.perf_counter)
    assert asked == [(*given, {"unfit": None, "record": None})]


def test_steps_that_become_a_graph_are_tried_on_a_stream_of_their_device(monkeypatch: Any) -> None:
    state, seen, given = build(precision="bf16"), [], {}
    state.graphed = True
    monkeypatch.setattr(mlp_autotune, "choose", lambda *_, record, **more: given.update(record=record))
    monkeypatch.setattr(trainer, "record_graph", lambda function, stream: (function, stream))
    monkeypatch.setattr(torch.cuda, "device", lambda device: seen.append(device) or contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: ("stream", device))
    trainer.resolve_mlp(state)
    assert given["record"](build) == (build, ("stream", CPU)) and seen == [CPU]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"precision": "fp32"}, "needs a step in bf16, it is in fp32"),
        ({"precision": "bf16", "compile": True}, "the blocks are compiled"),
        ({"precision": "bf16"}, "needs an NVIDIA GPU"),
    ],
)
def test_a_quack_that_cannot_be_used_is_refused_and_auto_goes_on(changes: dict, reason: str) -> None:
    with pytest.raises(ConfigError) as error:
        trainer.resolve_mlp(build(**changes, **{"run.mlp": "quack"}))
    assert str(error.value) == f"run.mlp quack: {reason}"
    assert trainer.resolve_mlp(build(**changes)) == Choice("kernels")


@pytest.mark.parametrize("said", ["", "MLP by quack (kernels 5 ms; quack 3 ms)"])
def test_a_run_takes_the_choice_and_says_it(said: str, monkeypatch: Any, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr("soflow_fast.runs.samples.EVALUATION_SAMPLES", 64)
    monkeypatch.setattr(trainer, "resolve_mlp", lambda state: Choice("quack", said))
    state = trainer.train(override(preset("digits"), TINY | {"run_dir": str(tmp_path / "run"), "batch_size": 8}))
    assert state.flow.network.mlp == "quack" and state.ema.network.mlp == "kernels"
    written = "".join(capsys.readouterr())
    assert (said in written) if said else ("MLP" not in written)
