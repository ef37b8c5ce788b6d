"""A run directory: one process trains in it, others may read; what it has lost is told, and what is left is kept."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from soflow_fast import load
from soflow_fast.config.schema import from_json
from soflow_fast.errors import ConfigError
from soflow_fast.runs import checkpoint, run_directory
from soflow_fast.runs.checkpoint import reading
from soflow_fast.runs.run_directory import LOCK, lock

FLAGS = ["--steps", "90000", "--checkpoint-every", "10", "--set=run.log_every=1", "--set=run.sample_every=0"]
SHORT = ["--steps", "20", "--checkpoint-every", "5", "--set=run.sample_every=0"]


@pytest.fixture(autouse=True)
def small_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("soflow_fast.runs.samples.EVALUATION_SAMPLES", 100)


def test_a_second_training_is_refused_and_the_first_goes_on(
    started: Any, until: Any, call: Any, refused: Any, tiny: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    log = run_dir / "metrics.jsonl"
    first = started(*tiny, *FLAGS, "--run-dir", run_dir)
    until(lambda: checkpoint.list_checkpoints(run_dir))
    for _ in range(3):  # its temporary folders are there most of the time
        line = refused("train", *tiny, *FLAGS, "--run-dir", run_dir)
        assert f"--run-dir {run_dir}: another process is training in it" in line
    for module, more in (("sample", ["--n", "1", "--out", tmp_path / "out"]), ("evaluate", ["--n", "100"])):
        assert call(module, run_dir, *more).code == 0, "reading takes no lock"
    before = log.read_bytes().count(b"\n")
    until(lambda: log.read_bytes().count(b"\n") > before + 8)
    assert "warning" not in first.output.read_text()
    first.kill(signal.SIGKILL)
    first.wait()
    third = started(*tiny, *FLAGS, "--run-dir", run_dir)  # the lock went with the process
    until(lambda: f"resuming {run_dir}" in third.output.read_text())
    third.kill(signal.SIGTERM)
    assert third.wait() == 143


def test_many_may_look_at_a_directory_at_once_but_not_beside_one_that_trains(run_dir: Path) -> None:
    """As all ranks of a run do when it begins."""
    config = from_json((run_dir / "config.json").read_text())
    assert (run_dir / LOCK).exists()
    with lock(run_dir, pytest.fail, shared=True):
        run_directory.check(run_dir, config)
        with pytest.raises(ConfigError, match="another process"), lock(run_dir, pytest.fail):
            pass
    with lock(run_dir, pytest.fail), pytest.raises(ConfigError, match="another process is training in it"):
        run_directory.check(run_dir, config)


def test_a_start_that_was_killed_before_it_wrote_its_configuration(run_dir: Path, tmp_path: Path) -> None:
    config, new = from_json((run_dir / "config.json").read_text()), tmp_path / "new"
    new.mkdir()
    (new / ".config.json.partial-77").write_text("{")
    run_directory.check(new, config)
    run_directory.prepare(new, config, "", False, pytest.fail)
    assert not list(new.glob(".*"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".config").write_text("{")
    with pytest.raises(ConfigError, match="neither empty nor a run"):
        run_directory.check(tmp_path / "other", config)


def test_a_checkpoint_that_goes_while_it_is_read(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader holds nobody up: what it was reading may be pushed out, and then it reads what is there."""
    new = tmp_path / "new"
    checkpoint.directory(run_dir).rename(new)
    shutil.copytree(new, checkpoint.directory(run_dir))
    plain, reads = reading.read_file, []

    def read_file(path: Path, *arguments: Any) -> bytes:
        reads.append(path.name)
        if len(reads) == 3:
            shutil.rmtree(checkpoint.directory(run_dir))
            (new / "step-00000015").rename(new / "step-00000025")
            (new / "step-00000020").rename(new / "step-00000030")
            for folder in new.iterdir():
                edit_step(folder)
            new.rename(checkpoint.directory(run_dir))
        return plain(path, *arguments)

    monkeypatch.setattr(reading, "read_file", read_file)
    load(run_dir)


def edit_step(folder: Path) -> None:
    """Let a whole checkpoint be of the step in its folder's name."""
    state, manifest = folder / "state.json", folder / "manifest.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "step": int(folder.name[-8:])}))
    sums = json.loads(manifest.read_text())
    sums["sha256"]["state.json"] = hashlib.sha256(state.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(sums))


def test_of_two_that_start_at_once_one_trains(started: Any, until: Any, tiny: list[str], tmp_path: Path) -> None:
    both = [started(*tiny, *FLAGS, "--seed", seed, "--run-dir", tmp_path / "run") for seed in (0, 1)]
    until(lambda: any("error" in training.output.read_text() for training in both))
    loser, winner = sorted(both, key=lambda training: "error" not in training.output.read_text())
    until(lambda: "training digits" in winner.output.read_text())
    assert loser.wait() == 2
    winner.kill(signal.SIGTERM)
    assert winner.wait() == 143


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks(
    number: int, call: Any, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    result = call("train", *tiny, "--steps", "2", "--run-dir", tmp_path / "run")
    assert (result.code, result.err) == (0, "")
    assert f"warning: {tmp_path / 'run' / LOCK}: cannot be locked ({os.strerror(number)})" in result.out


def test_a_file_system_that_locks_what_is_open_for_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NFS does."""
    plain = fcntl.flock

    def flock(handle: int, operation: int) -> None:
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        plain(handle, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    refused = pytest.raises(ConfigError, match="another process")
    with lock(tmp_path, pytest.fail), refused, lock(tmp_path, pytest.fail):
        pass


def test_the_lock_goes_with_the_block(tmp_path: Path) -> None:
    for _ in range(2):
        with lock(tmp_path, pytest.fail):
            pass


def test_a_disk_that_is_not_mounted(run_dir: Path, refused: Any, run_flags: list[str], files: Any) -> None:
    """`checkpoints` is a link to another disk: the run is not begun again, and nothing of it is touched."""
    place, elsewhere = checkpoint.directory(run_dir), run_dir.parents[1] / "disk"
    shutil.move(place, elsewhere)
    place.symlink_to(elsewhere)
    load(run_dir)
    elsewhere.rename(elsewhere.with_name("unmounted"))
    before = files(run_dir)
    line = refused("train", *run_flags, "--run-dir", run_dir)
    assert f"{place}: is a link to what is not there" in line
    assert files(run_dir) == before


def test_a_log_without_checkpoints_is_kept(run_dir: Path, call: Any, run_flags: list[str], logged: Any) -> None:
    log = run_dir / "metrics.jsonl"
    for k, name in enumerate(("metrics.jsonl.aside", "metrics.jsonl.aside-2")):
        old = log.read_bytes()
        shutil.rmtree(checkpoint.directory(run_dir))
        result = call("train", *run_flags, "--run-dir", run_dir)
        assert (result.code, result.err) == (0, ""), k
        assert f"warning: {log} has lines but there is no checkpoint" in result.out and name in result.out
        assert (run_dir / name).read_bytes() == old
        assert [line["step"] for line in logged(run_dir)] == list(range(2, 21, 2))


@pytest.mark.parametrize("content", [b"", bytes(700)], ids=["empty", "zeros"])
def test_a_configuration_that_was_lost(
    content: bytes, run_dir: Path, call: Any, refused: Any, run_flags: list[str]
) -> None:
    """As a loss of power leaves it. The checkpoints know what it was, and another one is still refused."""
    known = run_dir / "config.json"
    before = known.read_bytes()
    known.write_bytes(content)
    line = refused("train", *run_flags, "--run-dir", run_dir, "--seed", "1")
    assert "step-00000020: of a run with another configuration (seed: 0 -> 1)" in line
    assert known.read_bytes() == content
    result = call("train", *run_flags, "--run-dir", run_dir)
    assert result.code == 0 and f"resuming {run_dir} at step 20" in result.out
    assert from_json(known.read_text()).model == from_json(before.decode()).model


def test_what_is_renamed_is_synced_before_and_its_folder_after(
    call: Any, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each new name, and each folder above one, survives a loss of power."""
    done: list[tuple[str, str]] = []
    fsync, rename, replace, mkdir = os.fsync, os.rename, os.replace, Path.mkdir

    def synced(handle: int) -> None:
        done.append(("sync", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def renamed(source: Any, target: Any) -> None:
        done.append(("rename", f"{source} {target}"))
        (replace if str(target).endswith(".json") else rename)(source, target)

    def made(path: Path, *arguments: Any, **settings: Any) -> None:
        done.append(("mkdir", str(path)))
        mkdir(path, *arguments, **settings)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    monkeypatch.setattr(os, "replace", renamed)
    monkeypatch.setattr(Path, "mkdir", made)
    run_dir = tmp_path / "new" / "run"
    assert call("train", *tiny, *SHORT, "--run-dir", run_dir).code == 0
    folders = [tmp_path / "new", run_dir, checkpoint.directory(run_dir)]
    for folder in folders:
        at = done.index(("mkdir", str(folder)))
        assert done[at + 1] == ("sync", str(folder.parent))
    renames = [text.split() for kind, text in done if kind == "rename"]
    for source, target in renames:
        if "checkpoints/.partial" not in source and not target.endswith("config.json"):
            continue  # pictures and figures, which can be made again, and old checkpoints
        at = done.index(("rename", f"{source} {target}"))
        assert ("sync", source) in done[:at] and ("sync", str(Path(target).parent)) == done[at + 1]
    saved = [target for source, target in renames if "checkpoints/.partial" in source and "step" in Path(target).name]
    assert [Path(name).name for name in saved] == [f"step-{k:08d}" for k in (5, 10, 15, 20)]
    whole = {("sync", f"{source}/{name}") for source, t in renames if t in saved for name in os.listdir(saved[-1])}
    assert whole <= set(done)


def test_every_file_of_a_run_may_be_read_by_the_same_people(run_dir: Path) -> None:
    modes = {path.name: oct(path.stat().st_mode) for path in run_dir.rglob("*") if path.is_file()}
    assert len(modes) > 8 and len(set(modes.values())) == 1, modes
