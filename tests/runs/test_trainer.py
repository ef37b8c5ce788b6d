"""The loop of a run: what a signal, a full disk or a loss that is not finite do to it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from soflow_fast import preset
from soflow_fast.config.schema import Config, from_json, override
from soflow_fast.errors import ConfigError, Diverged, Interrupted, StorageError
from soflow_fast.evaluation import DigitScores
from soflow_fast.flow import SolutionFlow
from soflow_fast.runs import async_save, checkpoint, run_directory, samples, trainer
from soflow_fast.runs.trainer import recompute_in, resolved
from soflow_fast.training.state import TrainState
from soflow_fast.training.step import train_step

FIELDS: dict[str, Any] = {
    "model.hidden_size": 16,
    "model.depth": 1,
    "model.num_heads": 2,
    "run.log_every": 2,
    "run.sample_every": 3,
    "checkpoint_every": 4,
    "batch_size": 8,
    "steps": 11,
    "device": "cpu",
}
TIMING = {"images_per_s", "seconds", "memory_mb"}


def configuration(run_dir: Path, **changes: Any) -> Config:
    return preset("digits", **{**FIELDS, "run_dir": str(run_dir), **changes})


def fingerprint(flow: SolutionFlow, n: int, nfe: int, seed: int, decode: object) -> DigitScores:
    """In the place of the evaluation, which tests/commands/test_cli.py sees: a number that depends on every weight."""
    return DigitScores(float(sum(p.double().sum() for p in flow.parameters())), n, nfe)


@pytest.fixture(autouse=True)
def quick_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "measure_digits", fingerprint)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainState]:
    """A run to its end without interruption."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "measure_digits", fingerprint)
        return run_dir, trainer.train(configuration(run_dir))


def metrics(run_dir: Path) -> list[dict[str, float]]:
    entries = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k not in TIMING} for entry in entries]


def assert_same_end(run_dir: Path, whole: tuple[Path, TrainState]) -> None:
    """The final checkpoint to the bit, the metrics apart from timing, the grids and the figures."""
    reference = whole[0]
    ours, theirs = checkpoint.list_checkpoints(run_dir)[0], checkpoint.list_checkpoints(reference)[0]
    assert ours.name == theirs.name == "step-00000011"
    for name in ("network.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    assert metrics(run_dir) == metrics(reference)
    assert (run_dir / "evaluation.json").read_bytes() == (reference / "evaluation.json").read_bytes()
    grids = sorted(os.listdir(reference / "samples"))
    assert sorted(os.listdir(run_dir / "samples")) == grids
    for name in grids:
        assert (run_dir / "samples" / name).read_bytes() == (reference / "samples" / name).read_bytes()


def after_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], Any]) -> None:
    """Call `act` at the end of update number `step`, once."""

    def stepped(state: TrainState, *batch: Any) -> dict[str, torch.Tensor]:
        result = train_step(state, *batch)
        if state.step == step:
            monkeypatch.setattr(trainer, "train_step", train_step)
            result.update(act() or {})
        return result

    monkeypatch.setattr(trainer, "train_step", stepped)


def test_a_whole_run(whole: tuple[Path, TrainState], capsys: Any) -> None:
    run_dir, state = whole
    assert state.step == 11
    assert [entry["step"] for entry in metrics(run_dir)] == [2, 4, 6, 8, 10, 11]
    names = ("step-00000003", "step-00000006", "step-00000009", "final")
    assert {file.stem for file in (run_dir / "samples").iterdir()} == set(names)
    assert [folder.name for folder in checkpoint.list_checkpoints(run_dir)] == ["step-00000011", "step-00000008"]
    assert from_json((run_dir / "config.json").read_text()) == state.config
    assert all(torch.equal(v, state.ema.state_dict()[k]) for k, v in checkpoint.load(run_dir).state_dict().items())


@pytest.mark.parametrize(
    ("number", "step"),
    [(signal.SIGINT, 1), (signal.SIGTERM, 4), (signal.SIGINT, 6), (signal.SIGTERM, 9), (signal.SIGTERM, 11)],
)
def test_a_signal_saves_and_the_run_resumes_to_the_same_bits(
    number: signal.Signals, step: int, tmp_path: Path, whole: tuple[Path, TrainState], monkeypatch: Any, capsys: Any
) -> None:
    run_dir, handlers = tmp_path / "run", [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    after_step(monkeypatch, step, lambda: os.kill(os.getpid(), number))
    with pytest.raises(Interrupted, match=f"stopped and saved at step {step} of 11") as stopped:
        trainer.train(configuration(run_dir))
    assert stopped.value.exit_code == 128 + number
    assert checkpoint.list_checkpoints(run_dir)[0].name == f"step-{step:08d}"
    assert not (run_dir / "evaluation.json").exists()
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    capsys.readouterr()
    trainer.train(configuration(run_dir))
    assert f"resuming {run_dir} at step {step} of 11" in capsys.readouterr().out
    assert_same_end(run_dir, whole)


def test_a_signal_while_the_last_checkpoint_is_saved_is_not_lost(
    tmp_path: Path, whole: tuple[Path, TrainState], monkeypatch: Any
) -> None:
    write = checkpoint.write

    def signalled(run_dir: Path, content: checkpoint.Snapshot, *arguments: Any) -> Path:
        os.kill(os.getpid(), signal.SIGTERM) if content.step == 11 else None
        return write(run_dir, content, *arguments)

    monkeypatch.setattr(checkpoint, "write", signalled)
    with pytest.raises(Interrupted, match="at step 11 of 11"):
        trainer.train(configuration(tmp_path / "run"))
    monkeypatch.setattr(checkpoint, "write", write)
    trainer.train(configuration(tmp_path / "run"))
    assert_same_end(tmp_path / "run", whole)


def test_a_second_signal_stops_at_once_and_the_last_checkpoint_stands(
    tmp_path: Path, whole: tuple[Path, TrainState], monkeypatch: Any
) -> None:
    run_dir = tmp_path / "run"

    def act() -> None:
        while not checkpoint.list_checkpoints(run_dir):  # one under way would be abandoned
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)

    after_step(monkeypatch, 6, act)
    with pytest.raises(Interrupted, match="second signal; the last checkpoint stands") as stopped:
        trainer.train(configuration(run_dir))
    assert stopped.value.exit_code == 143
    assert [folder.name for folder in checkpoint.list_checkpoints(run_dir)] == ["step-00000004"]
    trainer.train(configuration(run_dir))
    assert_same_end(run_dir, whole)


def test_a_second_signal_during_the_save_leaves_nothing_half_written(
    tmp_path: Path, whole: tuple[Path, TrainState], monkeypatch: Any
) -> None:
    run_dir = tmp_path / "run"
    after_step(monkeypatch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="second signal"):
        patch.setattr(async_save, "PATIENCE", 60.0)  # a busy disk may take longer over one file than a user would wait
        plain = checkpoint.save_tensors

        def signalled(tensors: Any, path: Path) -> None:
            plain(tensors, path)
            if "step-00000006" in path.parent.name and path.name == "ema.safetensors":
                os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(checkpoint, "save_tensors", signalled)
        trainer.train(configuration(run_dir))
    assert os.listdir(run_dir / "checkpoints") == ["step-00000004"]
    trainer.train(configuration(run_dir))
    assert_same_end(run_dir, whole)


def test_a_signal_acts_at_once_while_nothing_is_to_be_saved(tmp_path: Path, monkeypatch: Any) -> None:
    def interrupt(*arguments: Any, **settings: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started the tests without one
        os.kill(os.getpid(), signal.SIGINT)

    # Before the first step, and after the last one.
    for module, name in ((trainer, "open_source"), (samples, "measure_digits")):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, name, interrupt)
            trainer.train(configuration(tmp_path / name))
    assert not (tmp_path / "open_source").exists()
    assert checkpoint.list_checkpoints(tmp_path / "measure_digits")[0].name == "step-00000011"


def test_a_kill_loses_the_steps_since_the_last_checkpoint_and_no_more(
    tmp_path: Path, whole: tuple[Path, TrainState], monkeypatch: Any
) -> None:
    run_dir = tmp_path / "run"

    def die() -> None:
        raise SystemExit("killed")

    after_step(monkeypatch, 7, die)
    with pytest.raises(SystemExit):
        trainer.train(configuration(run_dir))
    for stale in (run_dir / ".config.json.partial-1", run_dir / "samples" / ".final.png.partial-1"):
        stale.write_text("x")
    (run_dir / "checkpoints" / ".partial-step-00000008-1").mkdir()
    trainer.train(configuration(run_dir))
    assert not [file for file in run_dir.rglob("*") if ".partial-" in file.name]
    assert_same_end(run_dir, whole)


def test_tensorboard_has_the_metrics_and_the_grids_also_after_a_resume(tmp_path: Path, monkeypatch: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = tmp_path / "run"
    after_step(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted):
        trainer.train(configuration(run_dir))
    trainer.train(configuration(run_dir))
    board = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    logged = metrics(run_dir)
    figures = [f"eval_{name}{calls}" for name in DigitScores._fields for calls in ("", "_nfe2")]
    assert {*logged[0], *TIMING, *figures} - {"step"} == set(board.Tags()["scalars"])
    for name in ("fm_loss", "sc_mse", "lr"):
        points = [(point.step, point.value) for point in board.Scalars(name)]
        assert points == [(entry["step"], pytest.approx(entry[name])) for entry in logged]
    assert [image.step for image in board.Images("samples")] == [3, 6, 9, 11]
    (frechet,) = board.Scalars("eval_frechet_nfe2")
    kept = json.loads((run_dir / "evaluation.json").read_text())["nfe"]["2"]["frechet"]
    assert (frechet.step, frechet.value) == (11, pytest.approx(kept))


def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_saved(tmp_path: Path, monkeypatch: Any) -> None:
    assert Diverged.exit_code == 1
    after_step(monkeypatch, 8, lambda: {"sc_mse": torch.tensor(float("nan"))})
    with pytest.raises(Diverged, match="sc_mse not finite at step 8"):
        trainer.train(configuration(tmp_path / "run"))
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["step-00000004"]
    assert [entry["step"] for entry in metrics(tmp_path / "run")] == [2, 4, 6]


def test_a_checkpoint_that_cannot_be_saved_is_a_warning_except_the_last(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write", fail)
    with pytest.raises(StorageError) as error:
        trainer.train(configuration(tmp_path / "run"))
    assert str(error.value) == (
        f"--run-dir {tmp_path / 'run'}: cannot save the checkpoint of step 11: No space left on device"
    )
    out = capsys.readouterr().out
    assert [f"warning: checkpoint of step {step} not saved" in out for step in (4, 8, 11)] == [True, True, False]


@pytest.mark.parametrize(
    "failure",
    [
        MemoryError(),  # torch.OutOfMemoryError: tests/training/test_memory_estimate.py
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_out_of_memory_names_the_batch_size(tmp_path: Path, monkeypatch: Any, failure: Exception) -> None:
    def act() -> None:
        raise failure

    after_step(monkeypatch, 1, act)
    with pytest.raises(ConfigError, match="--batch-size 8: out of memory"):
        trainer.train(configuration(tmp_path / "run"))


def test_other_errors_stay_what_they_are(tmp_path: Path, monkeypatch: Any) -> None:
    def act() -> None:
        raise RuntimeError("shapes do not match")

    after_step(monkeypatch, 1, act)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        trainer.train(configuration(tmp_path / "run"))


def test_another_configuration_is_refused_and_the_run_stays(whole: tuple[Path, TrainState], tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(whole[0], tmp_path / "run"))
    before = (run_dir / "config.json").read_bytes()
    with pytest.raises(ConfigError) as error:
        trainer.train(configuration(run_dir, seed=1, **{"objective.p": 0.5}))
    assert "objective.p: 1.0 -> 0.5; seed: 0 -> 1" in str(error.value)
    assert str(error.value).startswith(f"--run-dir {run_dir}: holds a run with another configuration")
    assert (run_dir / "config.json").read_bytes() == before


def test_what_does_not_change_the_run_may_differ(whole: tuple[Path, TrainState], tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(whole[0], tmp_path / "moved"))
    state = trainer.train(configuration(run_dir, precision="fp32", checkpoint_every=0, **{"run.log_every": 1}))
    assert state.step == 11
    assert from_json((run_dir / "config.json").read_text()).run.checkpoint_every == 0


def test_a_run_without_labels_and_without_grids_on_the_way(tmp_path: Path) -> None:
    config = configuration(tmp_path / "run", **{"model.num_classes": 0, "run.sample_every": 0, "checkpoint_every": 0})
    trainer.train(config)
    assert os.listdir(tmp_path / "run" / "samples") == ["final.png"]
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["step-00000011"]
    assert not (tmp_path / "run" / "evaluation.json").exists()


def test_grids_are_drawn_by_the_average(tmp_path: Path, monkeypatch: Any) -> None:
    drawn: list[SolutionFlow] = []
    plain = samples.sample
    monkeypatch.setattr(samples, "sample", lambda flow, *a, **k: drawn.append(flow) or plain(flow, *a, **k))
    state = trainer.train(configuration(tmp_path / "run", **{"run.sample_every": 2}))
    assert len(drawn) > 1 and all(flow is state.ema for flow in drawn)


def test_resolved_says_what_auto_came_to() -> None:
    config = trainer.resolved(preset("digits", **{**FIELDS, "precision": "auto"}))
    assert (config.precision, config.run.device, config.run.run_dir) == ("fp32", "cpu", "runs/digits")


@pytest.mark.parametrize("kind", ["file", "other files", "junk config"])
def test_a_directory_that_is_no_run_is_refused(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "place"
    if kind == "file":
        place.write_text("x")
    else:
        place.mkdir()
        (place / ("config.json" if kind == "junk config" else "thesis.tex")).write_text("x")
    with pytest.raises(ConfigError, match=str(place)):
        trainer.train(configuration(place))
    assert len(list(tmp_path.rglob("*"))) == (1 if kind == "file" else 2)


def test_a_run_from_before_a_field_was_known_goes_on(whole: tuple[Path, TrainState], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole[0], run_dir)
    path = run_dir / "config.json"
    values = json.loads(path.read_text())
    del values["quotient"], values["quotient_precision"]
    path.write_text(json.dumps(values))
    run_directory.check(run_dir, whole[1].config)
    values["precision"] = "bf16"
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="another configuration"):
        run_directory.check(run_dir, whole[1].config)


STARTS = """
import shutil, sys
from importlib import import_module
from pathlib import Path
from soflow_fast.config.presets import preset
from soflow_fast.runs import samples, trainer

samples.EVALUATION_SAMPLES = 100
config = preset("digits", device="cpu", precision="fp32", steps=2, checkpoint_every=1, run_dir="run")
trainer.train(config)
shutil.rmtree("run/checkpoints/step-00000002")
trainer.train(config)
import_module("soflow_fast.sample").main(["run", "--out", "out", "--n", "1", "--device", "cpu"])
assert Path("out/00000.png").exists()
print(*(name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules))
"""


def test_a_run_its_resume_and_its_samples_do_without_the_compiler(environment: dict[str, str], tmp_path: Path) -> None:
    """torch imports it, two to four seconds, at the first of many calls that do not look like it."""
    ended = subprocess.run(
        [sys.executable, "-c", STARTS], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert "resuming run at step 1 of 2" in ended.stdout + ended.stderr
    assert ended.stdout.splitlines()[-1] == "", ended.stdout


@pytest.mark.parametrize(("free", "kind"), [(10**12, "nothing"), (10**7, "none")])
def test_what_a_backward_makes_again_depends_on_the_room(free, kind, monkeypatch):
    """On a GPU; a CPU makes nothing again, and what was asked for stays."""
    config = preset("digits", device="cpu")
    assert config.run.recompute == "auto" and resolved(config).run.recompute == "nothing"
    assert recompute_in(config, free) == kind
    asked = override(config, {"recompute": "block"})
    monkeypatch.setattr(trainer, "resolve_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(trainer, "resolve_precision", lambda name, device: "bf16")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**12))
    assert resolved(config).run.recompute == kind
    assert resolved(asked).run.recompute == "block"
