"""A run that an earlier version has saved: tests/data/run-format-1, 3 steps of a tiny network with an EMA teacher."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from soflow_fast import TrainState, load, train_step
from soflow_fast.data import open_source
from soflow_fast.runs import checkpoint
from soflow_fast.runs.checkpoint import load_with_config

RUN = Path(__file__).parents[1] / "data" / "run-format-1"


def test_its_weights_give_the_same_output() -> None:
    wanted = torch.tensor(json.loads((RUN / "expected.json").read_text())["output"])
    x, one = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8), torch.ones(1)
    got = load(RUN).network(x, one, 0 * one, torch.tensor([3])).flatten()
    # float32 rounding along some twenty products and norms, whose order may differ from one machine to another
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_it_goes_on(tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(RUN, tmp_path / "run"))
    state = TrainState.build(load_with_config(run_dir)[1])
    assert checkpoint.resume(run_dir, state, pytest.fail) and state.step == 3
    assert state.guard.read()[:2] == (0, 0)
    train_step(state, *open_source(state.config).batch(state.step))
    checkpoint.save(run_dir, state)
    assert [folder.name for folder in checkpoint.list_checkpoints(run_dir)] == ["step-00000004", "step-00000003"]


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in RUN.rglob("*") if file.is_file()) < 300_000
