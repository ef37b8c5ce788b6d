"""Checkpoints and `kill -9`: whatever the moment, a whole one is there; what is lost is at most one interval and the
steps made while a checkpoint was being written."""

import random
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from soflow_fast import TrainState, preset, train_step
from soflow_fast.data import open_source
from soflow_fast.errors import CheckpointError
from soflow_fast.runs import checkpoint
from soflow_fast.runs.async_save import Saver

INTERVAL = 4
FLAGS = f"--steps 90000 --checkpoint-every {INTERVAL} --set=run.log_every=1 --set=run.sample_every=0".split()


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.exists() else []


def is_whole(folder: Path) -> bool:
    try:
        checkpoint.load(folder)
    except CheckpointError:
        return False
    return True


def test_kills_in_the_midst_of_saving(started: Any, until: Any, count: Any, tiny: list[str], tmp_path: Path) -> None:
    """One run, killed again and again, goes on from the last checkpoint, or from the one before if that was begun."""
    run_dir, chance, kills = tmp_path / "run", random.Random(0), count(6, 50)
    folder, newest, stale = checkpoint.directory(run_dir), 0, 0
    for k in range(8 * kills):
        if k >= kills and stale >= kills // 5:  # how many meet a save is a matter of the machine's pace
            break
        training = started(*tiny, *FLAGS, "--run-dir", run_dir)
        first = f"resuming {run_dir} at step {newest} of" if newest else "training digits"
        until(lambda: first in training.output.read_text())  # noqa: B023
        reached = max([0, *(int(name[-8:]) for name in names(folder) if name.startswith("step-"))])
        until(lambda: max([0, *(int(n[-8:]) for n in names(folder) if n.startswith("step-"))]) > reached)  # noqa: B023
        assert not [name for name in names(folder) if f"step-{newest:08d}-" in name], "left by the start before"
        until(lambda: any(name.startswith(".partial") for name in names(folder)))
        # A save is a matter of milliseconds, and one follows the other.
        time.sleep(chance.random() * chance.choice([0.003, 0.01, 0.1]))
        training.kill(signal.SIGKILL)
        assert training.wait() == -signal.SIGKILL
        left = names(folder)
        stale += any(name.startswith(".partial") for name in left)
        found = checkpoint.list_checkpoints(run_dir)
        assert found and all(map(is_whole, found)), left
        begun = max(int(re.findall(r"step-(\d{8})", name)[0]) for name in left)
        newest = int(found[0].name[-8:])
        assert newest >= begun - INTERVAL, left
        logged = (run_dir / "metrics.jsonl").read_bytes().count(b"\n")
        # The checkpoint of step r is there before step r + INTERVAL is made.
        assert newest <= logged < newest + 2 * INTERVAL
    assert stale >= kills // 5, "the kills of this test came between the saves"
    training = started(*tiny, *FLAGS, "--run-dir", run_dir)
    until(lambda: "resuming" in training.output.read_text())
    training.kill(signal.SIGTERM)
    assert training.wait() == 143
    assert not [path for path in run_dir.rglob("*") if "partial" in path.name]


def test_saves_that_take_longer_than_an_interval(started: Any, until: Any, tiny: list[str], tmp_path: Path) -> None:
    """Steps go on beside the save, up to the one that is saved next, and wait there: no more than those can be lost."""
    run_dir = tmp_path / "run"
    log = run_dir / "metrics.jsonl"
    newest = lost = 0
    for _ in range(5):  # once, if the machine lets a few steps pass while an fsync sleeps
        training = started(*tiny, *FLAGS, "--run-dir", run_dir, slow=0.2)  # eight or more for each save
        first = f"resuming {run_dir} at step {newest} of" if newest else "training digits"
        until(lambda: first in training.output.read_text())  # noqa: B023
        most = newest + 3 * INTERVAL - 1
        until(lambda: log.exists() and log.read_bytes().count(b"\n") >= most)  # noqa: B023
        time.sleep(0.1)  # some ten steps, if it did not wait
        training.kill(signal.SIGKILL)
        assert training.wait() == -signal.SIGKILL
        newest = int(checkpoint.list_checkpoints(run_dir)[0].name[-8:])
        lost = log.read_bytes().count(b"\n") - newest
        assert lost < 2 * INTERVAL
        if lost == 2 * INTERVAL - 1:
            break
    assert lost == 2 * INTERVAL - 1


@pytest.fixture
def state() -> TrainState:
    small = {"model.hidden_size": 16, "model.depth": 1, "model.num_heads": 2, "batch_size": 8, "device": "cpu"}
    return TrainState.build(preset("digits", **small))


def advance(state: TrainState) -> None:
    train_step(state, *open_source(state.config).batch(state.step))


def test_a_checkpoint_is_of_its_step_however_far_training_has_gone_on(
    state: TrainState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, write = threading.Event(), checkpoint.write
    monkeypatch.setattr(checkpoint, "write", lambda *arguments: go.wait() and write(*arguments))
    advance(state)
    wanted = write(tmp_path / "wanted", checkpoint.snapshot(state), 2)
    with Saver(tmp_path / "run", 2, pytest.fail) as saver:
        saver.begin(state)
        advance(state)
        assert names(tmp_path / "run") == []
        go.set()
    (got,) = checkpoint.list_checkpoints(tmp_path / "run")
    assert {f.name: f.read_bytes() for f in got.iterdir()} == {f.name: f.read_bytes() for f in wanted.iterdir()}


def test_saves_do_not_overlap_and_failures_are_told(
    state: TrainState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running: list[int] = []
    most: list[int] = []

    def write(run_dir: Path, content: checkpoint.Snapshot, keep: int, proceed: Any, warn: Any, group: Any) -> None:
        running.append(content.step)
        most.append(len(running))
        time.sleep(0.01)
        running.pop()
        if not content.step:
            warn("not removed")
        else:
            raise OSError(28, "No space left on device") if content.step < 3 else RuntimeError("ours")

    monkeypatch.setattr(checkpoint, "write", write)
    told: list[str] = []
    saver = Saver(tmp_path, 2, told.append)
    for state.step in (0, 1, 2):
        saver.begin(state)
    saver.wait()
    full = [f"checkpoint of step {k} not saved: [Errno 28] No space left on device" for k in (1, 2)]
    assert told == ["not removed", *full]
    state.step = 1
    with pytest.raises(OSError, match="No space left"):
        saver.finish(state)
    state.step = 3
    with pytest.raises(RuntimeError, match="ours"), saver:
        saver.begin(state)
    assert len(told) == 3 and set(most) == {1}


def test_every_tensor_of_a_snapshot_is_a_copy(state: TrainState) -> None:
    advance(state)
    own = {value.data_ptr() for value in state.flow.state_dict().values()}
    own |= {value.data_ptr() for value in state.ema.state_dict().values()}
    own |= {v.data_ptr() for entry in state.optimizer.state_dict()["state"].values() for v in entry.values()}
    content = checkpoint.snapshot(state)
    copied = [value for values in content.tensors.values() for value in values.values()]
    assert all(isinstance(value, torch.Tensor) and value.data_ptr() not in own for value in copied)
