"""Disks that are full, read-only or over quota: a run goes on with warnings, its end is exit code 2, and the checkpoint
before is whole. The log lacks the lines that the disk refused, and TensorBoard all after the first of them."""

import contextlib
import errno
import itertools
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from soflow_fast import files
from soflow_fast.runs import checkpoint, run_directory, samples, trainer

FLAGS = ["--steps", "20", "--checkpoint-every", "5", "--set=run.sample_every=0"]
NUMBERS = [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO]
LIMIT = 12_000
"""Bytes of a file under RLIMIT_FSIZE: fewer than in a grid (13 800) or in weights (62 240), more than a run prints."""
KEEP = 2


@pytest.fixture(autouse=True)
def evaluates_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "EVALUATION_SAMPLES", 100)


def whole(run_dir: Path) -> list[str]:
    """The names of a run's checkpoints, newest first, all of them read."""
    found = checkpoint.list_checkpoints(run_dir)
    for folder in found:
        checkpoint.read_verified(folder)
    assert not list(checkpoint.directory(run_dir).glob(".partial*"))
    return [folder.name for folder in found]


# Errors where a file is written: every kind of refusal


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("failing", [{10}, {10, 15}, {15, 20}], ids=str)
def test_saves_that_the_disk_refuses(
    number: int, failing: set[int], call: Any, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third file of a checkpoint is where it happens. Without labels nothing is evaluated."""
    plain, run_dir = checkpoint.save_tensors, tmp_path / "run"

    def save(tensors: Any, path: Path) -> None:
        plain(tensors, path)
        if int(path.parent.name.split("-")[2]) in failing:
            raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(checkpoint, "save_tensors", save)
    result = call("train", *tiny, *FLAGS, "--set=model.num_classes=0", "--run-dir", run_dir)
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


@pytest.mark.parametrize(
    ("name", "number"),
    [("config.json", errno.EDQUOT), ("final.png", errno.EFBIG), ("evaluation.json", errno.EROFS)],
)
def test_other_files_that_the_disk_refuses(
    name: str, number: int, call: Any, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start nothing is trained; at the end the last checkpoint is there already."""
    run_dir = tmp_path / "run"

    def write_file(path: Path, content: bytes, **how: bool) -> None:
        if path.name == name:
            raise OSError(number, os.strerror(number), str(path))
        files.write_file(path, content, **how)

    for module in (run_directory, trainer, samples):
        monkeypatch.setattr(module, "write_file", write_file)
    result = call("train", *tiny, *FLAGS, "--run-dir", run_dir)
    assert result.code == 2 and result.err.count("\n") == 1, result
    assert str(run_dir) in result.err and name in result.err and os.strerror(number) in result.err
    assert "warning" not in result.out
    if name == "config.json":
        assert os.listdir(run_dir) == [run_directory.LOCK]
    else:
        assert "the checkpoint of step 20 is saved" in result.err
        assert whole(run_dir) == ["step-00000020", "step-00000015"]


def test_a_log_and_a_tensorboard_that_the_disk_refuses(
    call: Any, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is one warning, and the run comes to its end."""
    run_dir, plain = tmp_path / "run", trainer.MetricsLog

    def full(path: Path, *arguments: Any) -> trainer.MetricsLog:
        log = plain(path, *arguments)
        path.unlink()
        path.symlink_to("/dev/full")
        return log

    run_dir.mkdir()
    (run_dir / "config.json").write_text("")  # which a loss of power may leave
    (run_dir / "tensorboard").write_text("no folder")
    monkeypatch.setattr(trainer, "MetricsLog", full)
    result = call("train", *tiny, *FLAGS, "--run-dir", run_dir)
    assert (result.code, result.err) == (0, ""), result
    assert result.out.count("warning: metrics.jsonl from step 2 on not written: [Errno 28] No space left") == 1
    assert result.out.count("warning: tensorboard not written from here on") == 1
    assert result.out.count("warning: metrics.jsonl may lack its last lines") == result.out.count("warning") - 2 <= 1
    assert whole(run_dir) == ["step-00000020", "step-00000015"] and (run_dir / "evaluation.json").exists()


# Real ones: a small tmpfs in a mount namespace of its own, filled or made read-only in the midst of a run, and a limit


class Place(NamedTuple):
    """The place where a run writes, as the run and as the test see it, and the switches that close and open it."""

    started: Callable[..., Any]
    run_dir: Path
    seen: Path
    refuse: Callable[[int], bool]
    """Takes a process id and says whether it was done."""
    allow: Callable[[int], bool]


@pytest.fixture(params=["full", "read-only"])
def tmpfs(request: pytest.FixtureRequest, mounting: tuple[str, ...], started: Any, tmp_path: Path) -> Iterator[Place]:
    """A tmpfs that is filled to its last page, or mounted read-only anew."""
    if not mounting:
        pytest.skip("neither unshare --mount nor unshare -rm may mount a tmpfs here")
    place = tmp_path / "disk"
    place.mkdir()
    seen = Path(f"/proc/{started.process.pid}/root{place}")

    def command(*words: object) -> bool:
        return started.ask({"command": [*map(str, words)]}) == "0\n"

    def fill(pid: int) -> bool:
        with (seen / "ballast").open("wb", buffering=0) as file:
            for size in (2**20, 4096):
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)) == size:
                        pass
        return os.statvfs(seen).f_bfree == 0

    def empty(pid: int) -> bool:
        (seen / "ballast").unlink()
        return True

    def remount(options: str) -> Callable[[int], bool]:
        return lambda pid: command("mount", "-o", f"remount,{options}", place)

    assert command("mount", "-t", "tmpfs", "-o", "size=16m", "none", place)
    acts = {"full": (fill, empty), "read-only": (remount("ro"), remount("rw"))}
    yield Place(started, place / "run", seen / "run", *acts[request.param])
    assert command("umount", "-l", place)


def limited(started: Any, folder: Path) -> Place:
    """A folder of which a process may write only the first bytes of each file: EFBIG."""

    def limit(size: int) -> Callable[[int], bool]:
        def limit(pid: int) -> bool:
            hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))
            return True

        return limit

    return Place(started, folder / "run", folder / "run", limit(LIMIT), limit(resource.RLIM_INFINITY))


@pytest.fixture
def between(until: Callable[..., Any]) -> Callable[..., None]:
    """`between(training, place, act)`: acts while the training stands still and nothing in it holds or is to free room,
    so that what is refused then is refused from its first byte on."""

    def calm(place: Place) -> bool:
        found = os.walk(place.seen)  # which, unlike rglob, passes over folders that vanish meanwhile
        begun = any(".partial" in name for _, folders, files in found for name in [*folders, *files])
        return not begun and len(checkpoint.list_checkpoints(place.seen)) == KEEP

    def attempt(training: Any, place: Place, act: Callable[[int], bool]) -> bool:
        if not calm(place):
            return False
        training.kill(signal.SIGSTOP)
        try:
            until(lambda: Path(f"/proc/{training.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
            return calm(place) and act(training.pid)
        finally:
            training.kill(signal.SIGCONT)

    return lambda training, place, act: until(lambda: attempt(training, place, act))


def logged_whole(run_dir: Path) -> None:
    """metrics.jsonl has every line but the refused ones, in order and whole, and TensorBoard those until then."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    text = (run_dir / "metrics.jsonl").read_text()
    steps = [json.loads(line)["step"] for line in text.splitlines()]
    assert text.endswith("\n") and steps[0] == 1
    missing = [(a, b) for a, b in itertools.pairwise(steps) if b != a + 1]
    assert len(missing) == 1 and missing[0][0] < missing[0][1], "the lines that were refused, in a row"
    board = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    points = [point.step for point in board.Scalars("lr")]
    assert points == list(range(1, len(points) + 1)) and missing[0][0] - 20 < len(points) < steps[-1]


def goes_on_and_ends(place: Place, tiny: list[str], until: Any, between: Any) -> None:
    """A run whose disk refuses for a while, takes again, and refuses in the end."""
    flags = ["--steps", "1000000", "--checkpoint-every", "10", "--set=run.log_every=1"]
    training = place.started(*tiny, *flags, "--run-dir", place.run_dir)
    before: list[str] = []

    def warned(text: str) -> int:
        return training.output.read_text().count(f"warning: {text}")

    def refuse(pid: int) -> bool:
        before[:] = whole(place.seen)
        return place.refuse(pid)

    def allow(pid: int) -> bool:
        assert whole(place.seen) == before
        return place.allow(pid)

    def refuse_again(pid: int) -> bool:
        logged_whole(place.seen)
        return refuse(pid)

    between(training, place, refuse)
    once = ["metrics.jsonl from step", "sample grid of step", "tensorboard not written"]
    until(lambda: all(map(warned, once)) and warned("checkpoint of step") >= 2)
    between(training, place, allow)
    assert [*map(warned, once)] == [1, 1, 1], training.output.read_text()

    until(lambda: checkpoint.list_checkpoints(place.seen)[0].name > before[0])
    between(training, place, refuse_again)
    training.kill(signal.SIGTERM)
    assert training.wait() == 2, training.output.read_text()
    text = training.output.read_text()
    error = f"soflow: error: --run-dir {place.run_dir}: cannot save the checkpoint of step "
    assert text.splitlines()[-1].startswith(error) and text.count("soflow: ") == 1, text
    assert whole(place.seen) == before


def test_a_disk_that_refuses_in_the_midst_of_a_run(tmpfs: Place, tiny: list[str], until: Any, between: Any) -> None:
    goes_on_and_ends(tmpfs, tiny, until, between)


def test_a_limit_in_the_midst_of_a_run(started: Any, tiny: list[str], tmp_path: Path, until: Any, between: Any) -> None:
    goes_on_and_ends(limited(started, tmp_path), tiny, until, between)
