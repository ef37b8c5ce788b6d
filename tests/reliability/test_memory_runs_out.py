"""Out of memory where nothing smaller helps: one line with advice, and the last checkpoint is whole."""

from pathlib import Path
from typing import Any

import pytest
import torch

from soflow_fast import evaluate
from soflow_fast.runs import checkpoint, trainer
from soflow_fast.training import step

ON_CPU = "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to ..."


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


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError(ON_CPU)])
@pytest.mark.parametrize(
    "where", ["soflow_fast.runs.checkpoint.load_with_data", "soflow_fast.flow.SolutionFlow.solution"]
)
@pytest.mark.parametrize("module", ["sample", "evaluate"])
def test_where_samples_are_drawn(
    module: str, where: str, error: Exception, refused: Any, run_dir: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """While the weights are loaded, and while they are used."""

    def fail(*arguments: Any, **settings: Any) -> None:
        raise error

    monkeypatch.setattr(where, fail)
    line = refused(module, run_dir, "--n", "100", *(["--out", tmp_path / "out"] if module == "sample" else []))
    advice = {"sample": ("--batch-size 64", "give a smaller one"), "evaluate": ("--n 100", "draw fewer")}[module]
    assert f"{advice[0]}: out of memory with {run_dir}; {advice[1]}" in line and not (tmp_path / "out").exists()


def test_other_errors_stay_what_they_are(run_dir: Path, monkeypatch: Any) -> None:
    def fail(*arguments: Any, **settings: Any) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr("soflow_fast.flow.SolutionFlow.solution", fail)
    with pytest.raises(RuntimeError, match="ours"):
        evaluate.main([str(run_dir), "--n", "100"])
