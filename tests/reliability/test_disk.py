"""Disks that are full, read-only or over quota: a save on the way is a warning, the last one exit code 2, and the
checkpoint before is whole."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from soflow_fast import checkpoint, saver

FLAGS = ["--steps", "20", "--checkpoint-every", "5", "--set=run.sample_every=0"]


def whole(run_dir: Path) -> list[str]:
    found = checkpoint.list_checkpoints(run_dir)
    for folder in found:
        checkpoint.read_verified(folder)
    assert not list(checkpoint.directory(run_dir).glob(".partial*"))
    return [folder.name for folder in found]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO])
@pytest.mark.parametrize("failing", [{10}, {10, 15}, {15, 20}], ids=str)
def test_saves_that_the_disk_refuses(
    number: int, failing: set[int], call: Any, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third file of a checkpoint is where it happens."""
    plain, run_dir = checkpoint._save_tensors, tmp_path / "run"

    def save(tensors: Any, path: Path) -> None:
        plain(tensors, path)
        if int(path.parent.name.split("-")[2]) in failing:
            raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(saver.checkpoint, "_save_tensors", save)
    result = call("train", *tiny, *FLAGS, "--run-dir", run_dir)
    for step in (10, 15):
        warned = f"warning: checkpoint of step {step} not saved: [Errno {number}]" in result.out
        assert warned == (step in failing), result
    if 20 in failing:
        assert result.code == 2 and result.err.count("\n") == 1
        assert "cannot save the checkpoint of step 20" in result.err and os.strerror(number) in result.err
        assert whole(run_dir) == ["step-00000010", "step-00000005"]
    else:
        assert (result.code, result.err) == (0, "")
        assert whole(run_dir)[0] == "step-00000020"
