"""A machine that stops: what a checkpoint goes on from is on the disk before the checkpoint is, or is known to be."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from soflow_fast.runs.metrics import MetricsLog

FLAGS = ["--steps", "20", "--checkpoint-every", "5", "--set=run.sample_every=0", "--set=model.num_classes=0"]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, bytes]]:
    """Every sync of a file or folder, with the file's content, and every rename, with the new name."""
    found: list[tuple[str, str, bytes]] = []

    def sync(plain: Any) -> Any:
        def act(handle: int) -> None:
            path = Path(os.readlink(f"/proc/self/fd/{handle}"))
            plain(handle)
            found.append(("sync", str(path), path.read_bytes() if path.is_file() else b""))

        return act

    def renaming(plain: Any) -> Any:
        def act(source: Any, target: Any) -> None:
            plain(source, target)
            found.append(("rename", str(target), str(source).encode()))

        return act

    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, sync(getattr(os, name)))
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, renaming(getattr(os, name)))
    return found


def test_the_log_is_on_the_disk_before_the_checkpoint(
    events: list[tuple[str, str, bytes]], call: Any, tiny: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    assert call("train", *tiny, "--set=run.log_every=1", *FLAGS, "--run-dir", run_dir).code == 0
    checkpoints = [i for i, (what, path, _) in enumerate(events) if what == "rename" and Path(path).name[:5] == "step-"]
    assert len(checkpoints) == 4
    for i in checkpoints:
        synced = [content for what, path, content in events[:i] if what == "sync" and path.endswith("metrics.jsonl")]
        assert json.loads(synced[-1].splitlines()[-1])["step"] >= int(events[i][1][-8:])


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_what_a_start_writes_anew_is_on_the_disk_before_it_replaces_the_old(
    name: str, events: list[tuple[str, str, bytes]], call: Any, tiny: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    assert call("train", *tiny, *FLAGS, "--run-dir", run_dir).code == 0
    at = next(i for i, (what, path, _) in enumerate(events) if what == "rename" and path == str(run_dir / name))
    source = events[at][2].decode()
    assert any(what == "sync" and path == source for what, path, _ in events[:at])
    assert events[at + 1][:2] == ("sync", str(run_dir))


def test_a_log_that_cannot_be_synced_is_a_warning(
    call: Any, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And fails no checkpoint."""
    plain = os.fdatasync

    def refuse(handle: int) -> None:
        if os.readlink(f"/proc/self/fd/{handle}").endswith("metrics.jsonl"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        plain(handle)

    monkeypatch.setattr(os, "fdatasync", refuse)
    result = call("train", *tiny, "--set=run.log_every=1", *FLAGS, "--run-dir", tmp_path / "run")
    assert result.code == 0
    # Of four: two may be told as one.
    assert 1 <= result.out.count("warning: metrics.jsonl may lack its last lines if the machine stops: [Errno 5]") <= 4
    assert "not saved" not in result.out


def test_a_refused_sync_names_the_log(tmp_path: Path) -> None:
    warnings: list[str] = []
    log = MetricsLog(tmp_path / "metrics.jsonl", 0, pytest.fail)
    log.write({"step": 1})
    log.sync(pytest.fail)
    (tmp_path / "metrics.jsonl").unlink()
    log.sync(warnings.append)
    assert len(warnings) == 1 and "[Errno 2]" in warnings[0] and "metrics.jsonl may lack its last lines" in warnings[0]
