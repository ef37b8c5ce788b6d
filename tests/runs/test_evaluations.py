"""Evaluations on the way and at the end of a run: where their figures stand, and that they change nothing."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from soflow_fast.config.presets import preset
from soflow_fast.config.schema import Config
from soflow_fast.config.validation import validate
from soflow_fast.errors import ConfigError, DataError, Interrupted
from soflow_fast.evaluation import judge
from soflow_fast.hub.card import model_card
from soflow_fast.launch import Launch
from soflow_fast.runs import checkpoint, samples, trainer
from soflow_fast.runs.samples import Evaluations, Grids
from soflow_fast.training.state import TrainState
from tests import ranked_states
from tests.evaluation.small import Small, pictures, save_folder
from tests.forked import on_ranks
from tests.states import build

FIELDS = {
    "model.hidden_size": 16,
    "model.depth": 1,
    "model.num_heads": 2,
    "run.log_every": 2,
    "run.sample_every": 0,
    "run.eval_samples": 100,
    "device": "cpu",
    "precision": "fp32",
    "steps": 6,
    "batch_size": 8,
    "checkpoint_every": 0,
}


def configuration(run_dir: Path, **changes: Any) -> Config:
    return preset("digits", **{**FIELDS, "run_dir": str(run_dir), **changes})


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_digits_on_the_way(tmp_path: Path, capsys: Any) -> None:
    state = trainer.train(configuration(tmp_path / "run", eval_every=2))
    said = [line for line in capsys.readouterr().out.splitlines() if "classified as their label" in line]
    assert [line.partition(":")[0] for line in said] == ["step 2", "step 4", "1 step ", "2 steps"]
    found = [entry for entry in lines(tmp_path / "run") if "eval_frechet" in entry]
    assert [entry["step"] for entry in found] == [2, 4]
    assert all(entry.keys() == {"step", "eval_accuracy", "eval_frechet", "eval_near_copies"} for entry in found)
    assert f"Frechet distance {found[1]['eval_frechet']:.1f}," in said[1]
    final = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert final["samples"] == 100 and final["nfe"].keys() == {"1", "2"}
    assert final["few"] is True and final["reference"] == {"path": "digits", "images": 1797}
    assert all(line.endswith(" (100 samples against 1797 real digits, fewer than 50000)") for line in said)
    plain = trainer.train(configuration(tmp_path / "plain"))
    for name, weight in plain.ema.state_dict().items():
        assert torch.equal(weight, state.ema.state_dict()[name]), name
    assert [entry["step"] for entry in lines(tmp_path / "plain")] == [2, 4, 6]


def test_tensorboard_has_the_figures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer.train(configuration(tmp_path / "run", eval_every=3))
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    point, last = board.Scalars("eval_accuracy")
    (entry,) = [entry for entry in lines(tmp_path / "run") if "eval_accuracy" in entry]
    assert point.step == entry["step"] == 3 and point.value == pytest.approx(entry["eval_accuracy"])
    final = json.loads((tmp_path / "run" / "evaluation.json").read_text())["nfe"]
    assert last.step == 6 and last.value == pytest.approx(final["1"]["accuracy"])


def test_a_resumed_run_has_each_evaluation_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after step 4, whose evaluation is made before its checkpoint is."""
    trainer.train(configuration(tmp_path / "whole", eval_every=2))
    plain = trainer.train_step

    def stopping(state: TrainState, *batch: Any) -> Any:
        found = plain(state, *batch)
        if state.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="stopped and saved at step 4 of 6"):
        patch.setattr(trainer, "train_step", stopping)
        trainer.train(configuration(tmp_path / "parts", eval_every=2))
    trainer.train(configuration(tmp_path / "parts", eval_every=2))
    whole, parts = (
        [entry for entry in lines(tmp_path / name) if "eval_frechet" in entry] for name in ("whole", "parts")
    )
    assert [entry["step"] for entry in whole] == [2, 4] and parts == whole
    assert [entry["step"] for entry in lines(tmp_path / "parts")] == [2, 2, 4, 4, 6]


def test_against_a_reference_on_the_way_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    reference = save_folder(pictures(110, 0), tmp_path / "reference")
    asked: list[dict[str, str]] = []
    monkeypatch.setattr(judge, "open_networks", lambda names, **files: asked.append(files) or {"inception": Small()})
    settings = {"eval_every": 4, "reference": str(reference), "run.metrics": "fid,is", "run.inception": "weights.pth"}
    state = trainer.train(configuration(tmp_path / "run", **settings))
    assert asked == [{"inception": "weights.pth", "dinov2": ""}], "it is opened once"
    said = capsys.readouterr().out.splitlines()
    (entry,) = [entry for entry in lines(tmp_path / "run") if "eval_fid" in entry]
    assert entry.keys() == {"step", "eval_fid", "eval_is", "eval_is_std"} and entry["step"] == 4
    (line,) = [line for line in said if line.startswith("step 4: 1 step : FID ")]
    assert line.endswith(f"; of 100 images, fewer than 50000, against {reference} (110 images)")
    final = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert final["step"] == 6 and final["samples"] == 100 and final["reference"]["images"] == 110
    assert final["nfe"]["2"].keys() == {"fid", "is", "is_std"} and said[-1].startswith("2 steps: FID ")
    # What is published names the reference, and no folder of this machine.
    origin = checkpoint.load(tmp_path / "run").origin
    assert origin.figures["nfe"] == final["nfe"]
    checkpoint.load(tmp_path / "run").save_pretrained(tmp_path / "given")
    given = checkpoint.load(tmp_path / "given")
    assert given.origin.figures["reference"]["path"] == "reference"
    card = model_card(given, given.origin, "x")
    assert "Of 100 samples, fewer than the 50000 that are usual" in card
    assert ", compared with reference (110 images):" in card and "| network calls | fid | is | is std |" in card
    assert str(tmp_path) not in (tmp_path / "given" / "README.md").read_text() and state.step == 6


def test_references_that_are_wrong_are_told_before_the_run_begins(tmp_path: Path) -> None:
    reference = str(save_folder(pictures(10, 0), tmp_path / "reference"))
    run_dir = tmp_path / "run"
    with pytest.raises(DataError, match="--reference nowhere: No such file"):
        trainer.train(configuration(run_dir, reference="nowhere"))
    with pytest.raises(ConfigError, match=r"run\.metrics: 'fidd' is none of"):
        trainer.train(configuration(run_dir, reference=reference, **{"run.metrics": "fidd"}))
    assert not run_dir.exists()
    with pytest.raises(ConfigError, match=r"^run\.dinov2 FILE is needed"):
        trainer.train(configuration(run_dir, reference=reference, **{"run.metrics": "fd-dinov2"}))
    with pytest.raises(ConfigError, match=r"--eval-every 2: without --reference PATH digits with labels"):
        trainer.train(configuration(tmp_path / "unlabelled", eval_every=2, **{"model.num_classes": 0}))
    with pytest.raises(ValueError, match=r"eval_every must be 0 without run\.reference, as the data are no digits"):
        validate(preset("cifar10", eval_every=5))


def test_latents_need_their_vae(tmp_path: Path) -> None:
    reference = str(save_folder(pictures(10, 0), tmp_path / "reference"))
    changes = {"data.kind": "latents", "model.in_channels": 4, "reference": reference}
    state = TrainState.build(configuration(tmp_path / "run", **changes))
    with pytest.raises(ConfigError, match="their VAE is not on this machine"):
        Evaluations(state, Grids(state, None, print))


def test_a_rank_that_only_draws_draws_the_same_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = str(save_folder(pictures(10, 0), tmp_path / "reference"))
    changes = {"reference": reference, "run.metrics": "fd-random", "run.eval_samples": 130}
    state = TrainState.build(configuration(tmp_path / "run", **changes))
    drawn: list[tuple[Any, ...]] = []
    real = samples.Drawing.batch
    monkeypatch.setattr(
        samples.Drawing, "batch", lambda self, flow, rows: drawn.append((self.times, rows)) or real(self, flow, rows)
    )
    grids = Grids(state, None, print)
    _, figures = Evaluations(state, grids, first=True).at(2)
    measured = drawn[:]
    drawn.clear()
    assert Evaluations(state, grids, first=False).at(2) == ("", {})
    assert drawn == measured and len(drawn) == 3 and figures.keys() == {"fd_random"}


def measured_on(launch: Launch, reference: str) -> tuple[str, dict[str, float]]:
    changes = {"reference": reference, "run.metrics": "fd-random", "run.eval_samples": 100}
    state = ranked_states.state_of(ranked_states.joined(launch, "fsdp"), **changes)
    return Evaluations(state, Grids(state, None, print), first=launch.rank == 0).at(1)


def test_two_ranks_with_a_part_of_the_network_each_measure_what_one_process_does(tmp_path: Path) -> None:
    reference = str(save_folder(pictures(20, 0), tmp_path / "reference"))
    (_, first), second = on_ranks(2, measured_on, reference)
    changes = {**ranked_states.CHANGES, "reference": reference, "run.metrics": "fd-random", "run.eval_samples": 100}
    state = TrainState.build(build(**changes).config)
    _, alone = Evaluations(state, Grids(state, None, print)).at(1)
    assert second == ("", {}) and first == pytest.approx(alone, rel=1e-5)
