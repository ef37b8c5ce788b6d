"""Output that goes away, is full, closed or cannot encode a name, and the signal of a lost terminal: no run is lost to
any of them."""

import hashlib
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from soflow_fast.commands import process
from soflow_fast.config.schema import Config
from soflow_fast.errors import Interrupted
from soflow_fast.runs import checkpoint, signals, trainer
from soflow_fast.runs.progress import Progress
from soflow_fast.train import configuration

FLAGS = ["--checkpoint-every", "5", "--set=run.log_every=1", "--set=run.sample_every=0"]
HOURS = ["--steps", "1000000"]


def saved(run_dir: Path) -> int:
    """The step of the newest checkpoint, which is whole; 0 before the first."""
    found = checkpoint.list_checkpoints(run_dir)
    if found:
        checkpoint.read_verified(found[0])
    return int(found[0].name[-8:]) if found else 0


def short(tiny: list[str], run_dir: Path) -> Config:
    """Flags of a run of two steps that evaluates nothing."""
    values = configuration([*tiny, "--set=model.num_classes=0", "--steps", "2", "--run-dir", str(run_dir)])
    return values[0]


class Terminal:
    """A terminal: what is written to `file` can be read, until it is closed."""

    def __init__(self) -> None:
        self.master, self._slave = pty.openpty()
        self.file = Path(os.ttyname(self._slave))

    def read(self, until: bytes) -> bytes:
        """The text on it, up to the text that is waited for."""
        found = b""
        while until not in found and select.select([self.master], [], [], 60)[0]:
            found += os.read(self.master, 4096)
        return found

    def close(self) -> None:
        os.close(self.master)
        os.close(self._slave)


@pytest.fixture
def handlers() -> Iterator[None]:
    """Puts the handlers of signals back."""
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_terminal_that_is_closed(started: Any, until: Any, logged: Any, tiny: list[str], tmp_path: Path) -> None:
    """Without its signal, as under nohup or setsid: the run goes on to its end."""
    terminal, run_dir = Terminal(), tmp_path / "run"
    training = started(*tiny, *FLAGS, "--steps", "150", "--run-dir", run_dir, output=terminal.file)
    assert b"\x1b[2Kstep " in terminal.read(b"\x1b[2Kstep ")
    terminal.close()
    assert training.wait() == 0
    assert saved(run_dir) == 150 and (run_dir / "evaluation.json").exists()
    assert [entry["step"] for entry in logged(run_dir)] == list(range(1, 151))


@pytest.mark.parametrize("numbers", [["SIGHUP"], ["SIGHUP"] * 3, ["SIGHUP", "SIGTERM"], ["SIGTERM", "SIGHUP"]], ids=str)
def test_the_signal_of_a_lost_terminal(
    numbers: list[str], started: Any, until: Any, logged: Any, tiny: list[str], tmp_path: Path
) -> None:
    """It comes several times, from the kernel and from the shell, and beside the SIGTERM of systemd: all are one."""
    terminal, run_dir = Terminal(), tmp_path / "run"
    training = started(*tiny, *FLAGS, *HOURS, "--run-dir", run_dir, output=terminal.file)
    terminal.read(b"\x1b[2Kstep ")
    until(lambda: saved(run_dir) >= 5)
    terminal.close()
    for name in numbers:
        training.kill(signal.Signals[name])
    codes = {128 + signal.Signals[name] for name in numbers}  # of two that come at once, Python says which is first
    assert training.wait() in codes
    steps = [entry["step"] for entry in logged(run_dir)]
    assert steps == list(range(1, saved(run_dir) + 1)) and len(steps) > 5


def caught(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    mask = int(re.findall(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[0], 16)
    return bool(mask >> (number - 1) & 1)


def test_a_terminal_that_is_lost_while_a_process_starts(
    started: Any, until: Any, tiny: list[str], tmp_path: Path
) -> None:
    training = started(*tiny, *HOURS, "--run-dir", tmp_path / "run")
    until(lambda: caught(training.pid, signal.SIGHUP))
    for _ in range(3):
        training.kill(signal.SIGHUP)
    assert (training.wait(), training.output.read_text()) == (129, "soflow: interrupted\n")


@pytest.mark.parametrize("number", signals.SIGNALS, ids=lambda number: number.name)
def test_a_signal_before_the_first_statement(
    number: signal.Signals, handlers: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It comes once the handlers are set, and nothing has begun."""
    monkeypatch.setattr(process, "_open_streams", lambda: signal.raise_signal(number))
    with pytest.raises(SystemExit) as ended:
        process.run(lambda: pytest.fail("it began"))
    assert ended.value.code == 128 + number
    assert capsys.readouterr().err == "soflow: interrupted\n"


def test_a_signal_that_is_ignored_stays_ignored(handlers: None) -> None:
    """As nohup has it."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def act() -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        with signals.collected() as pending:
            os.kill(os.getpid(), signal.SIGHUP)
            assert pending == []

    with pytest.raises(SystemExit) as ended:
        process.run(act)
    assert ended.value.code == 0 and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_second_signal_is_not_that_of_the_terminal(handlers: None) -> None:
    with signals.collected() as pending:
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(number)
        with pytest.raises(Interrupted, match="second signal"):
            signal.raise_signal(signal.SIGINT)
    assert pending[0] == signal.SIGHUP


def test_a_log_on_a_full_disk(started: Any, tiny: list[str], logged: Any, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    training = started(*tiny, *FLAGS, "--steps", "20", "--run-dir", run_dir, output=Path("/dev/full"))
    assert training.wait() == 0
    assert saved(run_dir) == 20 and len(logged(run_dir)) == 20 and (run_dir / "evaluation.json").exists()


CLOSED = """
import os, sys
from soflow_fast.commands import process
from soflow_fast.errors import UserError
from soflow_fast.runs.progress import Progress
assert sys.stdout is None and sys.stderr is None
def act():
    file = open(sys.argv[1], "wb", buffering=0)
    os.write(1, b"of C code")
    print("of Python")
    Progress(10).say("a line")
    file.write(b"ours")
    raise UserError("x")
process.run(act)
"""


def test_output_that_is_closed_from_the_start(environment: dict[str, str], tmp_path: Path) -> None:
    """The next file that is opened would take its number, and C code would print into it."""
    shell = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", CLOSED, str(tmp_path / "x")]
    assert subprocess.run(shell, env=environment).returncode == 2
    assert (tmp_path / "x").read_bytes() == b"ours"


def test_training_without_output(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a library, without `process.run`."""
    monkeypatch.setattr(sys, "stdout", None)
    assert trainer.train(short(tiny, tmp_path / "run")).step == saved(tmp_path / "run") == 2


ASCII = "from soflow_fast.commands import process; process.run(lambda: print('\\u00fc\\udcff'))"


def test_names_that_the_output_cannot_encode(environment: dict[str, str]) -> None:
    raw = io.BytesIO()
    progress = Progress(10, io.TextIOWrapper(raw, encoding="ascii"))
    progress.say("training in o\u00fc\udcff\x1b[2J")
    assert raw.getvalue() == b"training in o\\xfc\\udcff\\x1b[2J\n"
    setting = {**environment, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", ASCII], env=setting, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"\\xfc\\udcff\n", b"")


class Failing(io.StringIO):
    """A terminal whose window was closed, or that says so only later."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error, self.writes = error, 0

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.writes += 1
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        OSError(5, "Input/output error"),
        OSError(9, "Bad file descriptor"),
        ValueError("I/O operation on closed file"),
        BrokenPipeError(),
    ],
    ids=str,
)
def test_output_that_went_away_is_left_alone(error: Exception) -> None:
    stream = Failing(error)
    progress = Progress(10, stream)
    for step in range(1, 11):
        progress.update(step, {"memory_mb": 1.0}, 1.0, 1.0, 100.0)
        progress.say("a line")
    progress.close()
    assert stream.writes == 1
    stream = io.StringIO()
    stream.close()
    Progress(10, stream).say("a line")


def test_control_sequences_in_names_do_not_reach_the_terminal(call: Callable[..., Any], tmp_path: Path) -> None:
    """Nor a sign that turns the direction of writing."""
    name = "\x1b]0;title\x07\x1b[2J\u202egnp.png"
    (tmp_path / "set" / "a").mkdir(parents=True)
    (tmp_path / "set" / "a" / name).write_bytes(b"junk")
    result = call("train", "cifar10", "--device", "cpu", "--data", tmp_path / "set", "--run-dir", tmp_path / "run")
    assert result.code == 2 and "a/\\x1b]0;title\\x07\\x1b[2J\\u202egnp.png is no readable image" in result.err
    assert all(c.isprintable() for c in result.err.removesuffix("\n"))
    stream = io.StringIO()
    Progress(10, stream).say(f"warning: {name}")
    assert stream.getvalue() == "warning: \\x1b]0;title\\x07\\x1b[2J\\u202egnp.png\n"


def test_training_outside_of_the_main_thread(tiny: list[str], tmp_path: Path) -> None:
    ended: list[int] = []
    config = short(tiny, tmp_path / "run")
    thread = threading.Thread(target=lambda: ended.append(trainer.train(config).step))
    thread.start()
    thread.join()
    assert ended == [2] and saved(tmp_path / "run") == 2


def test_a_run_directory_that_is_no_text(call: Callable[..., Any], tiny: list[str], tmp_path: Path) -> None:
    """A byte that is no UTF-8, which Python has as a lone surrogate: files may be called so."""
    place = os.fsdecode(os.fsencode(tmp_path) + b"/r\xffn")
    flags = [*tiny, "--steps", "4", "--checkpoint-every", "2", "--set=model.num_classes=0", "--run-dir", place]
    first, again = call("train", *flags), call("train", *flags)
    assert (first.code, again.code) == (0, 0) and saved(Path(place)) == 4
    assert "/r\\udcffn: " in first.out and "/r\\udcffn at step 4 of 4" in again.out
    drawn = call("sample", place, "--out", place + "/out", "--n", "2")
    assert drawn.code == 0 and os.path.exists(os.fsencode(place) + b"/out/grid.png"), drawn


def test_a_warning_of_a_damaged_checkpoint_is_printable(run_dir: Path, capsys: Any) -> None:
    """The name in it is that of a tensor, whoever wrote the file."""
    newest = checkpoint.list_checkpoints(run_dir)[0]
    tensors = newest / "ema.safetensors"
    found = safetensors.torch.load(tensors.read_bytes())
    tensors.write_bytes(safetensors.torch.save({**found, "\x1b[2Jx": torch.zeros(1)}))
    known = json.loads((newest / "manifest.json").read_text())
    known["sha256"][tensors.name] = hashlib.sha256(tensors.read_bytes()).hexdigest()
    (newest / "manifest.json").write_text(json.dumps(known))
    checkpoint.load(run_dir)
    err = capsys.readouterr().err
    assert "of another model: \\x1b[2Jx does not fit; using" in err and err.removesuffix("\n").isprintable()
