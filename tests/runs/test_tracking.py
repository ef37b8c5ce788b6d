"""A run in a tracker: what arrives there, once each, and that nothing which goes wrong there reaches the training."""

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from soflow_fast import preset
from soflow_fast.config.schema import Config
from soflow_fast.errors import ConfigError
from soflow_fast.evaluation import DigitScores
from soflow_fast.launch import Launch
from soflow_fast.runs import samples, tracking, trainer
from soflow_fast.runs.tracking import Tracker, check_installed
from tests.forked import on_ranks

WANDB = """
import json, os, sys
def tell(kind, **content):
    with open(os.environ["SEEN"], "a") as file:
        file.write(json.dumps({"kind": kind, **content}) + "\\n")
class Settings:
    def __init__(self, **settings): self.settings = settings
class Image:
    def __init__(self, image): self.seen = [image.format, *image.size, image.getpixel((1, 0))]
class Run:
    def log(self, values, step):
        if step == int(os.environ.get("DIES_AT", -1)):
            print("a line before", file=sys.stderr)
            raise ConnectionError("the network is gone")
        tell("log", step=step, values={name: getattr(v, "seen", v) for name, v in values.items()})
    def finish(self): tell("finish")
def init(project, id, name, resume, dir, config, settings):
    print("wandb: noise that nobody wants to see")
    if "HANGS" in os.environ:
        import time
        time.sleep(60)
    tell("init", project=project, id=id, name=name, resume=resume, dir=dir, config=config, tty=sys.stdin.isatty())
    return Run()
"""
TRACKIO = """
import wandb
run = None
Image = wandb.Image
def init(project, name, resume, config, embed):
    global run
    run = wandb.init(project, None, name, resume, None, config, None)
def log(values, step): run.log(values, step)
def finish(): run.finish()
"""


class Seen:
    """What a tracker has been told."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __call__(self, kind: str) -> list[dict[str, Any]]:
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return [entry for entry in map(json.loads, lines) if entry["kind"] == kind]


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Packages `wandb` and `trackio` that write down what they are told."""
    for name, text in {"wandb": WANDB, "trackio": TRACKIO}.items():
        (tmp_path / "packages" / name).mkdir(parents=True)
        (tmp_path / "packages" / name / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    for name in ("WANDB_PROJECT", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return Seen(tmp_path / "seen")


def configuration(folder: Path, tracker: str = "wandb") -> Config:
    folder.mkdir(exist_ok=True)
    return preset("digits", **{"run_dir": str(folder), "track": tracker})


def quick(flow: object, n: int, nfe: int, seed: int, decode: object) -> DigitScores:
    """In the place of the evaluation."""
    return DigitScores(0.5 * nfe, 8.0, 0.0)


GRID = torch.tensor([[[1, 2, 3], [4, 5, 6]]], dtype=torch.uint8)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_numbers_grids_and_configuration_arrive_in_order(
    name: str, seen: Seen, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "runs" / "<b>3"
    run_dir.parent.mkdir()
    tracker = Tracker(configuration(run_dir, name), run_dir, False, pytest.fail)
    tracker.write({"step": 10, "loss": 0.5, "lr": 1e-3})
    tracker.image(GRID, 10)
    tracker.write({"step": 20, "loss": 0.25, "lr": 1e-3})
    tracker.close()
    (begun,) = seen("init")
    kept = json.loads((run_dir / "tracking.json").read_text())[name]
    assert kept["step"] == 20 and begun["project"] == "soflow-fast" and not begun["tty"]
    assert begun["resume"] == "allow" and begun["config"]["optim.lr"] == 4e-3
    if name == "wandb":
        assert (begun["name"], begun["id"], begun["dir"]) == ("<b>3", kept["id"], str(run_dir))
    else:
        assert begun["name"] == f"<b>3-{kept['id']}"
    assert [(entry["step"], entry["values"]) for entry in seen("log")] == [
        (10, {"loss": 0.5, "lr": 1e-3}),
        (10, {"samples": ["PNG", 2, 1, [4, 5, 6]]}),
        (20, {"loss": 0.25, "lr": 1e-3}),
    ]
    assert len(seen("finish")) == 1
    assert capfd.readouterr() == ("", ""), "what the package prints is not the run's output"


def test_a_run_that_goes_on_is_the_same_run_there_and_no_step_is_there_twice(seen: Seen, tmp_path: Path) -> None:
    config = configuration(tmp_path / "run")
    for resumed, steps in ((False, (10, 20, 30)), (True, (20, 30, 40))):
        tracker = Tracker(config, tmp_path / "run", resumed, pytest.fail)
        for step in steps:
            tracker.write({"step": step, "loss": step / 8})
        tracker.close()
    first, second = (entry["id"] for entry in seen("init"))
    assert first == second
    assert [entry["step"] for entry in seen("log")] == [10, 20, 30, 40]
    Tracker(config, tmp_path / "run", False, pytest.fail).close()
    assert seen("init")[-1]["id"] != first, "a run from step 0 is another one"


def test_a_tracker_that_dies_is_one_warning_with_its_last_line(
    seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DIES_AT", "20")
    warnings: list[str] = []
    tracker = Tracker(configuration(tmp_path / "run"), tmp_path / "run", False, warnings.append)
    for step in range(10, 1000, 10):
        tracker.write({"step": step, "loss": 1.0})
        tracker.image(GRID, step) if step == 40 else None
    tracker.close()
    tracker.write({"step": 1000, "loss": 1.0})
    assert warnings == ["wandb gets nothing from here on: ConnectionError: the network is gone"]
    assert [entry["step"] for entry in seen("log")] == [10] and not seen("finish")
    assert json.loads((tmp_path / "run" / "tracking.json").read_text())["wandb"]["step"] == 10
    assert capfd.readouterr() == ("", "")


def test_a_tracker_that_hangs_costs_no_step_and_bounds_what_waits(
    seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HANGS", "1")
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 0.5)
    monkeypatch.setattr(tracking, "MOST_WAITING", 100)
    warnings: list[str] = []
    began = time.monotonic()
    tracker = Tracker(configuration(tmp_path / "run"), tmp_path / "run", False, warnings.append)
    for step in range(1, 20_000):  # more than a pipe and the queue hold
        tracker.write({"step": step, "loss": 1.0})
    for step in range(20):
        tracker.image(GRID, step)
    tracker.flush()
    slow = time.monotonic() - began
    tracker.close()
    assert slow < 5 and time.monotonic() - began < slow + 5
    assert warnings == [
        "wandb is slower than the run: some of its numbers or grids are left out there",
        "wandb has not taken all within 0.5 s of the end",
    ]
    assert tracker._process is not None and tracker._process.poll() == -9


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_installed("none")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ConfigError, match=r"^--track wandb: needs the package wandb \(pip install wandb\)$"):
        check_installed("wandb")
    (tmp_path / "wandb").mkdir()  # as wandb itself makes it where a program was started
    with pytest.raises(ConfigError, match="needs the package wandb"):
        check_installed("wandb")


def test_train_without_the_package_writes_nothing(
    refused: Callable[..., str], tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line = refused("train", *tiny, "--steps", "4", "--run-dir", tmp_path / "run", "--track", "trackio")
    assert "--track trackio: needs the package trackio (pip install trackio)" in line
    assert not (tmp_path / "run").exists()


def test_a_run_is_tracked_from_its_first_line_to_its_figures(
    seen: Seen, call: Callable[..., Any], tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "measure_digits", quick)
    flags = [*tiny, "--run-dir", tmp_path / "run", "--track", "wandb", "--set=run.sample_every=4"]
    result = call("train", *flags, "--steps", "6")
    assert result.code == 0 and "warning" not in result.out + result.err
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    *told, last_grid, figures = [(entry["step"], entry["values"]) for entry in seen("log")]
    numbers = [(step, values) for step, values in told if "samples" not in values]
    assert numbers == [(entry.pop("step"), entry) for entry in log]
    assert [step for step, values in [*told, last_grid] if "samples" in values] == [4, 6]
    assert figures[0] == 6 and figures[1]["eval_accuracy"] == 0.5 and figures[1]["eval_accuracy_nfe2"] == 1
    assert call("train", *flags, "--steps", "6").code == 0
    assert len(seen("init")) == 1, "a run that has ended tells nothing again"


def train_two(launch: Launch, folder: Path) -> bool:
    samples.measure_digits = quick
    fields = {"model.hidden_size": 16, "model.depth": 1, "model.num_heads": 2, "run.log_every": 2, "batch_size": 8}
    given = {"run_dir": str(folder), "track": "wandb", "device": "cpu", "steps": 4, "run.sample_every": 2, **fields}
    trainer.train(preset("digits", **given))
    return launch.rank == 0


def test_of_two_ranks_the_first_tracks(seen: Seen, tmp_path: Path) -> None:
    assert on_ranks(2, train_two, tmp_path / "run") == [True, False]
    assert len(seen("init")) == len(seen("finish")) == 1
    assert [entry["step"] for entry in seen("log") if "fm_loss" in entry["values"]] == [2, 4]
    assert [entry["step"] for entry in seen("log") if "samples" in entry["values"]] == [2, 4]


# The packages themselves, where they are installed.


def test_wandb_itself_keeps_a_run_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for resumed, step in ((False, 10), (True, 20)):
        tracker = Tracker(configuration(tmp_path / "run"), tmp_path / "run", resumed, pytest.fail)
        tracker.write({"step": step, "loss": 0.5})
        tracker.image(GRID, step)
        tracker.close()
    kept = json.loads((tmp_path / "run" / "tracking.json").read_text())["wandb"]
    files = [*(tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")]
    assert kept["step"] == 20 and {file.name for file in files} == {f"run-{kept['id']}.wandb"}


def test_wandb_itself_without_a_login_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    warnings: list[str] = []
    tracker = Tracker(configuration(tmp_path / "run"), tmp_path / "run", False, warnings.append)
    tracker.write({"step": 10, "loss": 0.5})
    tracker.close()
    assert len(warnings) == 1 and "No API key configured" in warnings[0]


def test_trackio_itself_has_one_run_after_two_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for resumed, steps in ((False, (10, 20)), (True, (20, 30))):
        tracker = Tracker(configuration(tmp_path / "run", "trackio"), tmp_path / "run", resumed, pytest.fail)
        for step in steps:
            tracker.write({"step": step, "loss": step / 8})
        tracker.image(GRID, steps[-1])
        tracker.close()
    import sqlite3

    (file,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(file) as base:
        rows = base.execute("select run_name, step, metrics from metrics order by id").fetchall()
    base.close()
    identity = json.loads((tmp_path / "run" / "tracking.json").read_text())["trackio"]["id"]
    assert {name for name, _, _ in rows} == {f"run-{identity}"}
    assert [step for _, step, values in rows if "loss" in json.loads(values)] == [10, 20, 30]
    assert [step for _, step, values in rows if "samples" in json.loads(values)] == [20, 30]
