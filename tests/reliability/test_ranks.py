"""Several ranks: one that fails, dies or hangs ends all, with one line and one exit code; signals stop all at once."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

SCRIPT = Path(__file__).with_name("one_rank.py")
WITHIN = 25.0
"""Seconds in which all ranks are to have ended, of the 30 that are promised."""
HOST = r"\([^ )]+\)"


class Ended(NamedTuple):
    """How ranks ended."""

    codes: list[int]
    lines: list[str]
    """Ours, on stderr, of all ranks."""
    text: str
    """All that they printed."""
    folder: Path

    def noted(self, rank: int) -> str:
        """What a rank has left in its file of warnings."""
        path = self.folder / f"warnings-rank-{rank:05d}.txt"
        return path.read_text() if path.exists() else ""

    def saved(self, world: int) -> set[str]:
        return {(self.folder / f"saved-{rank}").read_text() for rank in range(world)}


@pytest.fixture
def end(started: Any, tmp_path: Path) -> Callable[..., Ended]:
    """`end(world, act, **fault)`: runs ranks to their end, `act(ranks)` meanwhile; those in `act`'s list do not end."""

    def end(world: int = 2, act: Callable[[list[Any]], list[int] | None] = lambda ranks: None, **fault: Any) -> Ended:
        ranks = started.ranks(world, tmp_path, **fault)
        stopped = act(ranks) or []
        began = time.monotonic()
        codes = [training.wait() for rank, training in enumerate(ranks) if rank not in stopped]
        assert time.monotonic() - began < WITHIN
        for rank in stopped:
            ranks[rank].kill(signal.SIGKILL)
            assert ranks[rank].wait() == -signal.SIGKILL
        text = "".join(training.output.read_text() for training in ranks)
        assert "Traceback" not in text, text
        return Ended(codes, re.findall("^soflow: .*", text, re.M), text, tmp_path)

    return end


def at_step(until: Any, folder: Path, step: int) -> None:
    """Wait until rank 0 has done some steps, or something has gone wrong."""
    path, outputs = folder / "steps-0", list(folder.glob("out-*"))

    def there() -> bool:
        failed = any("soflow: " in output.read_text() for output in outputs)
        return failed or (path.exists() and int(path.read_text() or 0) >= step)

    until(there)


def test_ranks_that_end_well_print_what_one_does(end: Any) -> None:
    done = end(rank=None, step=0, what="warn")
    assert done.codes == [0, 0]
    assert done.text.count("trained 30 steps") == 1
    assert "rank 0 on stdout" in done.text and "warning: rank 0 says so" in done.text
    assert "rank 1" not in done.text
    assert done.noted(0) == ""
    lines = done.noted(1).splitlines()
    for line, what in zip(
        lines, ["rank 1 says so", "UserWarning: a library of rank 1", "rank 1 on stderr"], strict=True
    ):
        assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\S* ", line) and what in line, lines


@pytest.mark.parametrize(
    ("fault", "code", "line"),
    [
        ({"rank": 1, "what": "raise"}, 1, rf"rank 1 {HOST}: KeyError: 'pixels' \(at one_rank.py:\d+\)"),
        pytest.param(
            *({"rank": 0, "what": "memory"}, 1, rf"rank 0 {HOST}: OutOfMemoryError: CUDA out of memory.*"),
            marks=pytest.mark.slow,
        ),
        ({"rank": 1, "what": "device"}, 2, rf"rank 1 {HOST}: --device cuda:1: there is none"),
        ({"rank": None, "what": "each"}, 2, rf"rank (\d) {HOST}: --data x: shard \1 is not there"),
        ({"rank": None, "what": "alike"}, 2, "--data x: is not there"),
        ({"rank": None, "what": "arguments"}, 2, "--steps 0: must be positive"),
        ({"rank": 1, "what": "arguments"}, 2, rf"rank 1 {HOST}: --steps 0: must be positive"),
        ({"rank": None, "what": "diverge"}, 1, "loss not finite at step 3"),
    ],
    ids=lambda value: value.get("what") if isinstance(value, dict) else "",
)
def test_an_error_is_told_once(end: Any, fault: dict[str, Any], code: int, line: str) -> None:
    """With its rank, unless it is everybody's."""
    done = end(step=3, **fault)
    assert done.codes == [code, code]
    assert len(done.lines) == 1 and re.fullmatch(f"soflow: error: {line}", done.lines[0]), done.text
    if fault["what"] == "raise":  # the traceback is kept, but not one that only says that a connection is lost
        assert 'raise KeyError("pixels")' in done.noted(1) and not done.noted(0)


def test_a_traceback_that_comes_before_the_run_directory_is_kept(end: Any) -> None:
    done = end(rank=1, what="early")
    assert done.codes == [1, 1]
    found = re.fullmatch(
        rf"soflow: error: rank 1 {HOST}: KeyError: 'pixels' .*; its traceback is in (\S+)", done.text[:-1]
    )
    assert found and 'raise KeyError("pixels")' in Path(found[1]).read_text()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_ends_all(end: Any, rank: int) -> None:
    """Rank 0 takes the store with it."""
    done = end(rank=rank, step=3, what="die")
    assert done.codes[rank] == -signal.SIGKILL and done.codes[1 - rank] == 1
    assert len(done.lines) == 1, done.text
    assert re.fullmatch(rf"soflow: error: rank {rank} {HOST}: died or lost its connection .*", done.lines[0])


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_rank_that_is_stopped_counts_as_dead(end: Any, rank: int) -> None:
    """No connection is closed: as when a machine goes away. With rank 0 the store gives no answer."""
    done = end(act=lambda ranks: [rank], rank=rank, step=10, what="stop")
    assert done.codes == [1]
    assert len(done.lines) == 1, done.text
    assert re.fullmatch(rf"soflow: error: rank {rank} {HOST}: died or lost its connection .*", done.lines[0])


def test_a_run_that_is_stopped_as_a_whole_goes_on(end: Any, until: Any, tmp_path: Path) -> None:
    """For longer than a silence: time in which this rank did not run says nothing of others."""

    def pause(ranks: list[Any]) -> None:
        at_step(until, tmp_path, 3)
        for training in ranks:
            training.kill(signal.SIGSTOP)
        time.sleep(4.5)
        for training in ranks:
            training.kill(signal.SIGCONT)

    done = end(act=pause, seconds=0.04)
    assert done.codes == [0, 0], done.text


@pytest.mark.parametrize(
    ("rank", "phase"), [(1, "data"), pytest.param(0, "step", marks=pytest.mark.slow)], ids=["data", "step"]
)
def test_a_rank_that_hangs_is_named(end: Any, rank: int, phase: str) -> None:
    done = end(rank=rank, step=5, what="hang", phase=phase, hang_seconds=2)
    assert done.codes == [1, 1]
    place = rf"no progress for \d+ s at step 5, in {phase} \(one_rank.py:\d+\)"
    assert len(done.lines) == 1 and re.fullmatch(rf"soflow: error: rank {rank} {HOST}: {place}", done.lines[0]), (
        done.text
    )


@pytest.mark.parametrize("phase", ["save", pytest.param("data", marks=pytest.mark.slow)])
def test_a_long_phase_does_not_hang(end: Any, until: Any, tmp_path: Path, phase: str) -> None:
    """A save is waited for; and data is, where hang_seconds is 0."""

    def act(ranks: list[Any]) -> None:
        at_step(until, tmp_path, 5)
        time.sleep(2)
        ranks[0].kill(signal.SIGKILL)

    done = end(act=act, rank=1, step=5, what="hang", phase=phase, hang_seconds=1 if phase == "save" else 0)
    assert done.codes == [-signal.SIGKILL, 1], "it hung until it was ended"
    assert "rank 0" in done.lines[0] and "died" in done.lines[0]


@pytest.mark.parametrize(
    ("rank", "number"), [(1, signal.SIGTERM), (0, signal.SIGHUP), (None, signal.SIGINT)], ids=["one", "first", "all"]
)
def test_a_signal_stops_all_at_the_same_step(end: Any, rank: int | None, number: int) -> None:
    done = end(rank=rank, step=5, what="signal", number=number)
    assert done.codes == [128 + number] * 2
    (step,) = done.saved(2)
    assert done.lines == [f"soflow: stopped and saved at step {step} of 30"]


def test_a_signal_that_is_forwarded_counts_once(end: Any, until: Any, tmp_path: Path) -> None:
    """A terminal and torchrun send the same one, to each rank."""

    def twice(ranks: list[Any]) -> None:
        at_step(until, tmp_path, 3)
        for _ in range(2):
            for training in ranks:
                training.kill(signal.SIGINT)
            time.sleep(0.05)

    done = end(act=twice, seconds=0.2)
    assert done.codes == [130, 130], done.text
    assert len(done.saved(2)) == 1 and len(done.lines) == 1


def test_a_signal_before_the_first_step_ends_all(end: Any) -> None:
    done = end(rank=1, step=0, what="signal")
    assert done.codes == [143, 143]
    assert done.lines == ["soflow: stopped before the first step; the same command begins where this one did"]


def test_a_signal_to_a_rank_that_waits_for_the_others_ends_those_that_come_later(end: Any) -> None:
    def stop(ranks: list[Any]) -> None:
        time.sleep(1)
        ranks[0].kill(signal.SIGTERM)

    done = end(act=stop, rank=1, step=0, what="late", seconds=2)
    assert done.codes == [143, 143]
    assert done.text == "soflow: interrupted\n"


@pytest.mark.slow
@pytest.mark.parametrize("what", ["raise", "die", "hang", "signal", "alike"])
def test_four_ranks(end: Any, what: str) -> None:
    done = end(4, rank=None if what == "alike" else 2, step=5, what=what, hang_seconds=2)
    code = {"signal": 143, "alike": 2}.get(what, 1)
    assert [done.codes[rank] for rank in (0, 1, 3)] == [code] * 3
    assert done.codes[2] == (-signal.SIGKILL if what == "die" else code)
    assert len(done.lines) == 1, done.text
    assert ("rank 2 " in done.lines[0]) == (what in ("raise", "die", "hang"))
    if what == "signal":
        assert len(done.saved(4)) == 1


def torchrun(environment: dict[str, str], folder: Path, *flags: str, **fault: Any) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *flags]
    given = [str(SCRIPT), str(folder), json.dumps(fault)]
    return subprocess.Popen(
        [*command, *given], env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_under_torchrun_stderr_has_our_line_and_torchrun_s_own(environment: dict[str, str], tmp_path: Path) -> None:
    out, err = (running := torchrun(environment, tmp_path, rank=1, step=3, what="raise")).communicate(timeout=120)
    assert running.returncode == 1
    before = err.partition("torch/distributed/elastic")[0].splitlines()
    assert len(before) == 2, err  # ours, and the beginning of its first line
    assert re.fullmatch(rf"soflow: error: rank 1 {HOST}: KeyError: .*", before[0])
    assert err.count("soflow: ") == 1 and "[c10d]" not in err and "pixels" not in err.partition("\n")[2]
    root = re.search(r"Root Cause.*?rank +: (\d).*?exitcode +: (\S+)", err, re.S)
    assert root and root.groups() == ("1", "1"), err
    assert not out


@pytest.mark.slow
def test_torchrun_restarts_after_a_death(environment: dict[str, str], tmp_path: Path) -> None:
    fault = {"rank": 1, "step": 5, "what": "die", "once": True}
    out, err = (running := torchrun(environment, tmp_path, "--max-restarts", "1", **fault)).communicate(timeout=180)
    assert running.returncode == 0, err
    assert out == "trained 30 steps\n"
    assert len(re.findall(rf"^soflow: error: rank 1 {HOST}: died .*", err, re.M)) == err.count("soflow: ") == 1


@pytest.mark.slow
def test_torchrun_that_is_stopped_stops_its_ranks(environment: dict[str, str], until: Any, tmp_path: Path) -> None:
    running = torchrun(environment, tmp_path, seconds=0.3)
    until(lambda: (tmp_path / "steps-0").exists() or running.poll() is not None)
    os.kill(running.pid, signal.SIGTERM)
    _, err = running.communicate(timeout=120)
    assert re.findall("^soflow: .*", err, re.M) == [
        f"soflow: stopped and saved at step {Path(tmp_path / 'saved-0').read_text()} of 30"
    ]
    assert (tmp_path / "saved-0").read_text() == (tmp_path / "saved-1").read_text()
    assert "SIGKILL" not in err
