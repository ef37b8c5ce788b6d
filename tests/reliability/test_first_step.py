"""Signals before the first step of a start is done: it may compile for long, and there is nothing to save."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from soflow_fast.errors import Interrupted
from soflow_fast.runs import checkpoint, signals, trainer

FLAGS = ["--steps", "1000", "--set=run.log_every=1"]
SAID = "soflow: stopped before the first step; the same command begins where this one did\n"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_while_the_first_step_compiles(
    environment: dict[str, str], until: Any, count: Any, tiny: list[str], tmp_path: Path
) -> None:
    """Compiled into a folder of its own: what is in there tells how far it is."""
    chance = random.Random(3)
    for k in range(count(1, 6)):
        number, cache, run_dir = (signal.SIGTERM, signal.SIGINT)[k % 2], tmp_path / f"cache{k}", tmp_path / str(k)
        command = [sys.executable, "-m", "soflow_fast.train", *tiny, *FLAGS, "--compile", "--run-dir", str(run_dir)]
        setting = {**environment, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
        process = subprocess.Popen(command, env=setting, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        until(lambda: list(cache.rglob("*.cpp")))  # noqa: B023
        time.sleep((k > 0) * 5 * chance.random())
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (128 + number, SAID)
        assert checkpoint.list_checkpoints(run_dir) == [] and (run_dir / "metrics.jsonl").read_bytes() == b""


@pytest.mark.parametrize("becomes", ["raised", "another error", "lost"])
@pytest.mark.parametrize("at", [0, 4])
def test_whatever_becomes_of_the_exception(
    becomes: str, at: int, call: Any, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a compiler others catch it, or it cannot be raised: then the step is done, and saved."""
    flags = [*tiny, *FLAGS, "--checkpoint-every", "4", "--run-dir", tmp_path / "run"]
    plain, on = trainer.train_step, [True]

    def step(state: Any, *batch: Any) -> Any:
        if state.step == at and on.pop():
            with contextlib.suppress(Interrupted) if becomes != "raised" else contextlib.nullcontext():
                os.kill(os.getpid(), signal.SIGTERM)
            if becomes == "another error":
                raise RuntimeError("the compiler's")
        elif state.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(state, *batch)

    if at:  # a start that resumes there
        on.append(False)
        with monkeypatch.context() as patch:
            patch.setattr(trainer, "train_step", lambda *given: step(*given))
            assert call("train", *flags).code == 143
        on[:] = [True]
        for folder in checkpoint.list_checkpoints(tmp_path / "run")[:-1]:
            shutil.rmtree(folder)
    monkeypatch.setattr(trainer, "train_step", step)
    result = call("train", *flags)
    assert result.code == 143
    newest = [int(folder.name[-8:]) for folder in checkpoint.list_checkpoints(tmp_path / "run")]
    if becomes == "lost":
        assert max(newest) == at + 1 and f"stopped and saved at step {at + 1} of" in result.err
    else:
        assert newest == [at] * bool(at) and result.err == SAID


def test_an_error_after_the_first_step_is_no_signal(
    call: Any, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = trainer.train_step

    def step(state: Any, *batch: Any) -> Any:
        if state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError("ours")
        return plain(state, *batch)

    monkeypatch.setattr(trainer, "train_step", step)
    with pytest.raises(RuntimeError, match="ours"):
        call("train", *tiny, *FLAGS, "--run-dir", tmp_path / "run")


def test_a_lost_terminal_stops_only_once() -> None:
    before = signal.getsignal(signal.SIGHUP)
    with signals.collected(lambda: True) as pending:
        with pytest.raises(Interrupted, match="before the first step"):
            signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
    assert len(pending) == 2 and signal.getsignal(signal.SIGHUP) == before
