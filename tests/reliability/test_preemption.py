"""SIGTERM and SIGINT at any moment: a checkpoint of the finished step, the exit code of the signal, exact resume."""

import contextlib
import os
import random
import re
import signal
import subprocess
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from soflow_fast.commands import process
from soflow_fast.errors import Interrupted
from soflow_fast.runs import checkpoint, signals

STEPS = 400 if os.environ.get("SOFLOW_SOAK") == "1" else 120
FLAGS = f"--steps {STEPS} --checkpoint-every 8 --set=run.log_every=1 --set=run.sample_every=50".split()
FILES = ("network.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json")
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


def is_caught(pid: int) -> bool:
    """Whether a process has come to its own handling of signals."""
    caught = int(re.findall(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[0], 16)
    return all(caught >> (number - 1) & 1 for number in CODES)


def is_over(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def is_saving(run_dir: Path) -> bool:
    return any(path.name.startswith(".partial") for path in checkpoint.directory(run_dir).glob(".*"))


@pytest.fixture(scope="module")
def whole(started: Any, tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without a signal."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert started(*tiny, *FLAGS, "--run-dir", run_dir).wait() == 0
    return run_dir


def test_signals_at_random_moments(
    started: Any, until: Any, count: Any, logged: Any, tiny: list[str], whole: Path, tmp_path: Path
) -> None:
    """One run to its end, however often it is stopped on the way."""
    chance, run_dir = random.Random(1), tmp_path / "run"
    saved = 0
    for k in range(count(3, 20)):
        kind, number = ("start-up", "steps", "save")[k % 3], list(CODES)[k % 2]
        training = started(*tiny, *FLAGS, "--run-dir", run_dir)
        until(lambda: is_caught(training.pid))  # noqa: B023
        if kind == "start-up":
            time.sleep(0.4 * chance.random())
        else:
            until(lambda: re.search("^step", training.output.read_text(), re.M))  # noqa: B023
            time.sleep(0.02 * chance.random())
        if kind == "save":
            until(lambda: is_saving(run_dir))
        training.kill(number)
        assert training.wait() == CODES[number], (kind, training.output.read_text())
        text = training.output.read_text()
        assert text.count("soflow: ") == 1 and text.splitlines()[-1].startswith("soflow: "), text
        stopped = re.search(r"stopped and saved at step (\d+)", text)
        assert stopped or kind == "start-up"
        if stopped:
            saved += 1
            newest = checkpoint.list_checkpoints(run_dir)[0]
            assert int(newest.name[-8:]) == int(stopped[1]) == logged(run_dir)[-1]["step"] < STEPS
            checkpoint.read_verified(newest)
    assert saved >= 2  # at start-up there may be nothing to save
    training = started(*tiny, *FLAGS, "--run-dir", run_dir)
    assert training.wait() == 0, training.output.read_text()
    ours, theirs = checkpoint.list_checkpoints(run_dir)[0], checkpoint.list_checkpoints(whole)[0]
    assert ours.name == theirs.name
    assert [name for name in FILES if (ours / name).read_bytes() != (theirs / name).read_bytes()] == []
    assert logged(run_dir) == logged(whole)
    assert not [path for path in run_dir.rglob("*") if "partial" in path.name]


def test_signals_while_a_process_starts(
    start: Callable[..., subprocess.Popen], until: Any, count: Any, tiny: list[str], tmp_path: Path
) -> None:
    """Most of a start is imports, into whose midst the signal comes."""
    chance = random.Random(2)
    for k in range(count(2, 8)):
        number = list(CODES)[k % 2]
        process = start(
            *("train", *tiny, *FLAGS, "--steps", 10**6, "--run-dir", tmp_path / str(k)),  # never done meanwhile
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        until(lambda: is_caught(process.pid))  # noqa: B023
        time.sleep(3 * chance.random())
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
        assert process.returncode == CODES[number], err
        assert err.startswith("soflow: ") and err.count("\n") == 1, err
        assert ("stopped and saved" in err) == bool(checkpoint.list_checkpoints(tmp_path / str(k)))


def test_a_second_signal_does_not_wait_for_a_disk_that_hangs(
    started: Any, until: Any, tiny: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    # Only the signal makes it save, so it has been seen when that begins; of two that have not, SIGINT would be first.
    training = started(*tiny, *FLAGS, "--checkpoint-every", "0", "--run-dir", run_dir, hang="rename")
    until(lambda: re.search("^step", training.output.read_text(), re.M))
    training.kill(signal.SIGTERM)
    until(lambda: is_saving(run_dir))
    time.sleep(0.2)
    assert not is_over(training.pid), "the first one waits for the checkpoint"
    training.kill(signal.SIGINT)
    until(lambda: is_over(training.pid))
    assert training.wait() == 130
    assert "second signal; the last checkpoint stands" in training.output.read_text()
    assert checkpoint.list_checkpoints(run_dir) == []
    training = started(*tiny, "--steps", STEPS, "--run-dir", run_dir)
    until(lambda: "training digits" in training.output.read_text())
    training.kill(signal.SIGTERM)
    assert training.wait() == 143 and not is_saving(run_dir)


@pytest.mark.parametrize("first", CODES)
@pytest.mark.parametrize("second", CODES)
@pytest.mark.parametrize("moment", ["at once", "while it is told", "after a save"])
def test_two_signals_anywhere_are_no_traceback(
    first: int, second: int, moment: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of its own. At once: the second comes before the exception of the first has gone anywhere."""

    def main() -> None:
        if moment == "after a save":
            with signals.collected() as pending:
                os.kill(os.getpid(), first)
            raise Interrupted(pending[0])
        with contextlib.ExitStack() as stack:
            if moment == "at once":
                stack.callback(os.kill, os.getpid(), second)
            os.kill(os.getpid(), first)

    child = os.fork()
    if child == 0:
        try:
            if moment != "at once":
                monkeypatch.setattr(process, "_say", lambda line, stream: os.kill(os.getpid(), second))
            process.run(main)
        except SystemExit as ended:
            os._exit(200 + (ended.code not in CODES.values()))
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == CODES[second], capfd.readouterr().err


def test_a_save_that_is_refused_goes_before_the_signal(
    started: Any, until: Any, tiny: list[str], tmp_path: Path
) -> None:
    """Exit code 2: the signal's own says that nothing was lost."""
    run_dir = tmp_path / "run"
    checkpoint.directory(run_dir).parent.mkdir()
    training = started(*tiny, *FLAGS, "--checkpoint-every", "0", "--run-dir", run_dir)
    until(lambda: re.search("^step", training.output.read_text(), re.M))
    checkpoint.directory(run_dir).write_text("no folder")
    training.kill(signal.SIGTERM)
    assert training.wait() == 2
    line = training.output.read_text().splitlines()[-1]
    assert re.match(rf"soflow: error: --run-dir {run_dir}: cannot save the checkpoint of step \d+: ", line), line


def test_a_signal_whose_exception_was_lost_is_not_lost() -> None:
    """Python drops what is raised in a destructor; here something else catches it."""
    handlers = {number: signal.getsignal(number) for number in signals.SIGNALS}
    hook, seen = threading.excepthook, []

    def swallowed() -> None:
        with contextlib.suppress(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)
        with signals.collected() as pending:
            seen.append(list(pending))

    def failed_import() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except Interrupted:
            raise ImportError("cannot import name 'x'") from None

    try:
        for act, code in ((swallowed, 143), (failed_import, 130), (lambda: None, 0)):
            with pytest.raises(SystemExit) as ended:
                process.run(act)
            assert ended.value.code == code
    finally:
        threading.excepthook = hook
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert seen == [[signal.SIGTERM]]
