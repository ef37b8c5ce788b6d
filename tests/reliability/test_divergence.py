"""A number that is not finite never reaches the weights: the run ends before, or skips the step and counts it."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from soflow_fast import TrainState, preset
from soflow_fast.config.schema import Config
from soflow_fast.data import open_source
from soflow_fast.errors import CheckpointError, ConfigError, Diverged
from soflow_fast.objective import Objective
from soflow_fast.runs import checkpoint, trainer
from soflow_fast.training import step
from soflow_fast.training.nonfinite import GIVE_UP, PLACES, FiniteFlags, NonfiniteGuard, note_finite

BAD = 7
"""The step that goes wrong, counted from 1: not one that is logged or saved."""
FIELDS: dict[str, Any] = {
    "model.hidden_size": 16,
    "model.depth": 1,
    "model.num_heads": 2,
    "run.log_every": 5,
    "run.sample_every": 0,
    "checkpoint_every": 5,
    "batch_size": 8,
    "steps": 25,
    "device": "cpu",
    "teacher": "ema",
}


def configuration(run_dir: Path, **changes: Any) -> Config:
    return preset("digits", **{**FIELDS, "run_dir": str(run_dir), **changes})


@pytest.fixture(autouse=True)
def no_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "evaluate", lambda *_: {})


def numbers(state: TrainState) -> list[torch.Tensor]:
    """All that a step may change, but for the counts."""
    assert state.teacher
    moments = [value for entry in state.optimizer.state.values() for value in entry.values()]
    flows = (state.flow, state.ema, state.teacher)
    return [v.detach().clone() for v in (*(p for flow in flows for p in flow.parameters()), *moments)]


def added(module: Any, name: str, change: Callable[[Any], Any]) -> AbstractContextManager:
    """Within it, a function's result is changed."""
    patch, plain = pytest.MonkeyPatch(), getattr(module, name)
    patch.setattr(module, name, lambda *a, **k: change(plain(*a, **k)))

    @contextmanager
    def context() -> Iterator[None]:
        try:
            yield
        finally:
            patch.undo()

    return context()


@contextmanager
def hooked(hook: Any) -> Iterator[None]:
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def spoiled_input(state: TrainState, x0: torch.Tensor, value: float) -> Iterator[None]:
    x0[3, 0, 2, 2] = value
    yield


def spoiled_guidance(state: TrainState, x0: torch.Tensor, value: float) -> AbstractContextManager:
    network = state.flow.network
    return hooked(network.register_forward_hook(lambda m, a, out: out if out.requires_grad else out + value))


def spoiled_network(state: TrainState, x0: torch.Tensor, value: float) -> AbstractContextManager:
    network = state.flow.network
    return hooked(network.register_forward_hook(lambda m, a, out: out + value if out.requires_grad else out))


def spoiled_teacher(state: TrainState, x0: torch.Tensor, value: float) -> AbstractContextManager:
    return added(step, "value_and_increment", lambda out: (out[0], out[1] + value))


def spoiled_loss(state: TrainState, x0: torch.Tensor, value: float) -> AbstractContextManager:
    return added(Objective, "consistency_term", lambda term: term._replace(loss=term.loss + value))


def spoiled_gradient(state: TrainState, x0: torch.Tensor, value: float) -> AbstractContextManager:
    return hooked(next(state.flow.parameters()).register_hook(lambda gradient: gradient + value))


SPOILED = {
    "input": spoiled_input,
    "guidance": spoiled_guidance,
    "network": spoiled_network,
    "teacher": spoiled_teacher,
    "loss": spoiled_loss,
    "gradient": spoiled_gradient,
}


def spoil(monkeypatch: Any, place: str, value: float, wrong: range) -> dict[int, list[torch.Tensor]]:
    """Let some steps, counted from 1, go wrong. Returns where every step keeps the numbers before it."""
    before: dict[int, list[torch.Tensor]] = {}

    def stepped(state: TrainState, x0: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        before[state.step] = numbers(state)
        if state.step + 1 not in wrong:
            return step.train_step(state, x0, y)
        with SPOILED[place](state, x0, value):
            return step.train_step(state, x0, y)

    monkeypatch.setattr(trainer, "train_step", stepped)
    return before


def test_every_place_is_tried() -> None:
    assert tuple(SPOILED) == PLACES


@pytest.mark.parametrize(("value", "micro"), [(math.nan, 0), (math.inf, 3)], ids=["nan", "inf in micro-batches"])
@pytest.mark.parametrize("place", PLACES)
def test_the_run_ends_and_names_step_and_place(
    place: str, value: float, micro: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = spoil(monkeypatch, place, value, range(BAD, BAD + 1))
    with pytest.raises(Diverged) as ended:
        trainer.train(configuration(tmp_path, micro_batch=micro))
    assert str(ended.value).startswith(f"{place} not finite at step {BAD}; ") and ended.value.exit_code == 1
    assert max(before) == 9, "it is noticed where the log is written, at step 10"
    assert all(map(torch.equal, before[BAD - 1], before[9])), "the steps until then moved something"
    assert [folder.name for folder in checkpoint.list_checkpoints(tmp_path)] == ["step-00000005"]
    monkeypatch.setattr(trainer, "train_step", step.train_step)
    assert trainer.train(configuration(tmp_path, micro_batch=micro)).step == 25


@pytest.mark.parametrize("place", PLACES)
def test_skipped_steps_are_counted_and_the_run_goes_on(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: Any
) -> None:
    wrong = range(BAD, BAD + GIVE_UP - 1)
    before = spoil(monkeypatch, place, math.nan, wrong)
    state = trainer.train(configuration(tmp_path, on_nonfinite="skip"))
    assert state.step == 25
    for i in range(1, 25):
        assert all(map(torch.equal, before[i - 1], before[i])) == (i in wrong), i
    lines = logged(tmp_path)
    assert [(line["step"], line["skipped"]) for line in lines] == [(5, 0), (10, 4), (15, 9), (20, 9), (25, 9)]
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    name = "sc_loss" if place == "loss" else "grad_norm"  # that loss is changed by a constant, without gradient
    assert name not in lines[1] and name in lines[3]


def test_ten_in_a_row_end_the_run_however_late_that_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = spoil(monkeypatch, "gradient", math.inf, range(3, 3 + GIVE_UP))
    changes = {"on_nonfinite": "skip", "run.log_every": 20, "checkpoint_every": 0}
    with pytest.raises(Diverged, match="gradient not finite at step 12, the 10th in a row; "):
        trainer.train(configuration(tmp_path, **changes))
    assert max(before) == 19
    assert all(map(torch.equal, before[2], before[19])), "good steps after the tenth moved something"


def test_the_counts_survive_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: Any) -> None:
    wrong = range(4, 4 + GIVE_UP)
    spoil(monkeypatch, "input", math.nan, wrong)
    with pytest.raises(Diverged, match="step 13, the 10th in a row"):
        trainer.train(configuration(tmp_path, on_nonfinite="skip"))
    values = json.loads((checkpoint.list_checkpoints(tmp_path)[0] / "state.json").read_text())
    assert values == {"format": 1, "step": 10, "skipped": 7, "in_row": 7}
    with pytest.raises(Diverged, match="step 13, the 10th in a row"):  # not three more
        trainer.train(configuration(tmp_path, on_nonfinite="skip"))
    spoil(monkeypatch, "input", math.nan, range(0))
    assert trainer.train(configuration(tmp_path)).step == 25, "the stricter run makes its first step"


def put(state: TrainState, kind: str, value: float) -> str:
    """A number that is not finite where the step's own checks do not look before the next one. Returns its file."""
    if kind == "optimizer":
        next(iter(state.optimizer.state.values()))["exp_avg_sq"].flatten()[3] = value
    else:
        flow = {"network": state.flow, "ema": state.ema, "teacher": state.teacher}[kind]
        assert flow
        with torch.no_grad():
            next(flow.parameters()).flatten()[3] = value
    return f"{kind}.safetensors"


@pytest.mark.parametrize(
    ("policy", "value", "at"), [("stop", math.nan, 10), ("skip", -math.inf, 10), ("stop", math.inf, 15)]
)
@pytest.mark.parametrize("kind", ["network", "ema", "teacher", "optimizer"])
def test_a_state_that_is_not_finite_is_never_saved(
    kind: str, value: float, policy: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a periodic save and at the last one; the checkpoint before it stands, and the run goes on from there."""

    def stepped(state: TrainState, x0: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        metrics = step.train_step(state, x0, y)
        if state.step == at:
            put(state, kind, value)
        return metrics

    monkeypatch.setattr(trainer, "train_step", stepped)
    with pytest.raises(
        Diverged, match=rf"{kind}\.safetensors: .* not finite after step {at}; .* last checkpoint stands"
    ):
        trainer.train(configuration(tmp_path, on_nonfinite=policy, steps=15))
    assert checkpoint.list_checkpoints(tmp_path)[0].name == f"step-{at - 5:08d}"
    assert not list(checkpoint.directory(tmp_path).glob(".partial*"))
    monkeypatch.setattr(trainer, "train_step", step.train_step)
    assert trainer.train(configuration(tmp_path, on_nonfinite=policy, steps=15)).step == 15


def test_an_update_that_overflows_is_never_saved(tmp_path: Path) -> None:
    """Every loss and gradient of the first step is finite, and its update is not."""
    with pytest.raises(Diverged, match=r"not finite after step 1; "):
        trainer.train(configuration(tmp_path, checkpoint_every=1, **{"optim.lr": 1e38, "optim.weight_decay": 10.0}))
    assert checkpoint.list_checkpoints(tmp_path) == []


@pytest.mark.parametrize("kind", ["network", "ema", "teacher", "optimizer"])
def test_a_checkpoint_that_is_not_finite_is_passed_over(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an earlier version may have saved it."""
    state = TrainState.build(configuration(tmp_path))
    source = open_source(state.config)
    for _ in range(2):
        step.train_step(state, *source.batch(state.step))
        if state.step == 2:
            file = put(state, kind, math.nan)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "first_not_finite", lambda tensors: "")
            checkpoint.save(tmp_path, state)
    again, warnings = TrainState.build(configuration(tmp_path)), []
    assert checkpoint.resume(tmp_path, again, warnings.append) and again.step == 1
    assert len(warnings) == 1 and f"step-00000002/{file}: " in warnings[0] and "is not finite; using" in warnings[0]
    assert checkpoint.load(tmp_path).training is False
    if kind == "ema":
        with pytest.raises(CheckpointError, match="is not finite"):
            checkpoint.load(checkpoint.list_checkpoints(tmp_path)[0])


@pytest.mark.parametrize("name", ["optim.lr", "optim.eps"])
@pytest.mark.parametrize("value", [1e-50, 1e-39, 3.5e38, 1e300])
def test_rates_that_float32_does_not_have_are_refused(name: str, value: float, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be 0 or of a size from 1.2e-38 to 3.4e38, as float32 is"):
        trainer.train(configuration(tmp_path, **{name: value}))


def test_the_guard_never_waits_for_the_device() -> None:
    """A tensor on the meta device has no data: whatever looked at it would raise."""
    meta = torch.device("meta")
    guard, seen = NonfiniteGuard(meta, 10), FiniteFlags()
    for place in PLACES:
        note_finite(seen, place, torch.empty(4, 2, device=meta), torch.empty((), device=meta))
    guard.step.fill_(3)
    assert guard.should_update(seen).device == guard.skipped().device == meta


def test_the_first_place_is_named() -> None:
    for first in range(len(PLACES)):
        guard, seen = NonfiniteGuard(torch.device("cpu"), 1), FiniteFlags()
        for k, place in enumerate(PLACES):
            note_finite(seen, place, torch.tensor([1.0, math.nan if k >= first else 2.0]))
        guard.step.fill_(first)
        assert not guard.should_update(seen)
        assert guard.read()[:4] == (1, 1, first, PLACES[first]) and guard.read().given_up
