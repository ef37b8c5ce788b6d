"""Thousands of steps: memory and open files stay as they are, and compiled blocks are compiled once."""

import gc
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from soflow_fast import TrainState, preset, train_step
from soflow_fast.data import open_source
from soflow_fast.runs import trainer

SMALL = {"model.hidden_size": 16, "model.depth": 2, "model.num_heads": 2, "batch_size": 8, "device": "cpu"}


@pytest.mark.slow
def test_memory_and_open_files(
    started: Any, until: Any, count: Any, tiny: list[str], tmp_path: Path, record_property: Any
) -> None:
    steps, run_dir = count(800, 10_000), tmp_path / "run"
    settled = steps // 4  # the first saves, grids and lines make what then stays
    flags = ["--steps", steps, "--checkpoint-every", 50, "--set=run.log_every=10", "--set=run.sample_every=200"]
    training = started(*tiny, *flags, "--run-dir", run_dir)
    place, log, seen = Path(f"/proc/{training.pid}"), run_dir / "metrics.jsonl", []

    def read() -> bool:
        """One more reading of (steps, MB, open files); whether the last step is near."""
        lines = log.read_bytes().count(b"\n") if log.exists() else 0
        resident = int((place / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
        if 10 * lines >= settled and (not seen or 10 * lines > seen[-1][0]):
            seen.append((10 * lines, resident, len(os.listdir(place / "fd"))))
        return 10 * lines >= 0.95 * steps

    until(read, 600_000)
    assert training.wait() == 0, training.output.read_text()
    at, memory, files = (np.array(column) for column in zip(*seen, strict=True))
    assert len(seen) >= 30
    slope = 1000 * np.polyfit(at, memory, 1)[0]
    record_property("steps", steps)
    record_property("MB per 1000 steps", slope)
    # A short run has not come to rest: what it takes once and keeps is most of its slope. The whole one is the measure.
    assert slope < count(20, 1)
    half = len(files) // 2  # a file that is being written is open at some of the readings; one that is leaked, at all
    assert files[half:].min() <= files[:half].min(), "open files grow"


def test_neither_tensors_nor_files_pile_up(call: Any, tiny: list[str], tmp_path: Path, monkeypatch: Any) -> None:
    """The short form: how many are there after each step, with a save every fourth."""
    plain, files, tensors = trainer.train_step, [], []

    def step(*given: Any) -> Any:
        metrics = plain(*given)
        files.append(len(os.listdir("/proc/self/fd")))
        tensors.append(sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects()))
        return metrics

    monkeypatch.setattr(trainer, "train_step", step)
    monkeypatch.setattr(trainer, "evaluate", lambda *given: {})  # it takes most of the time
    flags = ["--steps", 32, "--checkpoint-every", 4, "--set=run.log_every=2", "--set=run.sample_every=6"]
    assert call("train", *tiny, *flags, "--run-dir", tmp_path / "run").code == 0
    assert len(files) == 32
    for seen in (files, tensors):  # a save under way has some: hence the least
        assert min(seen[20:]) <= min(seen[8:20])


# torch's own
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*is deprecated")
@pytest.mark.parametrize("steps", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_no_recompilation_after_the_tenth_step(steps: int, count: Any) -> None:
    torch._dynamo.reset()
    counters.clear()
    state = TrainState.build(preset("digits", **SMALL))
    state.flow.network.compile_blocks("aot_eager")
    source = open_source(state.config)
    for _ in range(10):
        train_step(state, *source.batch(state.step))
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    for _ in range(count(steps, 1000)):
        train_step(state, *source.batch(state.step))
    assert counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()
