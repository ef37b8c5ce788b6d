"""Out of memory where nothing smaller helps: one line with advice, and the last checkpoint is whole."""

from pathlib import Path
from typing import Any

import pytest
import torch

from soflow_fast import checkpoint, step, trainer


def test_one_line_with_advice(refused: Any, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stepped(state: Any, *batch: Any) -> Any:
        if state.step == 7:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return step.train_step(state, *batch)

    monkeypatch.setattr(trainer, "train_step", stepped)
    line = refused("train", *tiny, "--steps", "20", "--checkpoint-every", "5", "--run-dir", tmp_path / "run")
    assert "out of memory" in line and "--micro-batch" in line and "--recompute" in line
    (newest,) = checkpoint.list_checkpoints(tmp_path / "run")
    assert newest.name == "step-00000005"
    checkpoint.read_verified(newest)
