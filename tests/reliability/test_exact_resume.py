"""A run that was killed and started again ends with the bits of one that was not, its log included."""

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from soflow_fast.config.presets import preset
from soflow_fast.config.schema import override
from soflow_fast.data import open_source
from soflow_fast.runs import checkpoint

# What is measured now and then, every 9 steps, is neither logged nor saved at the same steps as the rest.
FLAGS = [*["--steps", "60", "--checkpoint-every", "7", "--teacher", "ema"], "--set=run.log_every=2"]
FLAGS += ["--set=run.check_quotient_every=9"]
LAST = "step-00000060"
FILES = (*(f"{name}.safetensors" for name in ("network", "ema", "teacher", "optimizer")), "state.json")


@pytest.fixture(scope="module")
def straight(started: Any, tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that is not killed."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    training = started(*tiny, *FLAGS, "--run-dir", run_dir)
    assert training.wait() == 0, training.output.read_text()
    return run_dir


@pytest.mark.parametrize("kills", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_kills_change_no_bit(
    kills: int, straight: Path, started: Any, until: Any, logged: Any, tiny: list[str], tmp_path: Path
) -> None:
    killed, chance = tmp_path / "killed", random.Random(3)
    for after in sorted(chance.sample(range(2, 27), kills)):
        training = started(*tiny, *FLAGS, "--run-dir", killed)
        log = killed / "metrics.jsonl"
        until(lambda: log.exists() and log.read_bytes().count(b"\n") >= after)  # noqa: B023
        time.sleep(0.02 * chance.random())
        training.kill(signal.SIGKILL)
        assert training.wait() == -signal.SIGKILL
    training = started(*tiny, *FLAGS, "--run-dir", killed)
    assert training.wait() == 0 and "resuming" in training.output.read_text(), training.output.read_text()
    for name in FILES:
        parts = [run_dir / "checkpoints" / LAST / name for run_dir in (straight, killed)]
        assert parts[0].read_bytes() == parts[1].read_bytes(), name
    lines = logged(straight)
    assert logged(killed) == lines
    assert [line["step"] for line in lines if "q_cosine" in line] == [9, 18, 27, 36, 45, 54]
    assert checkpoint.list_checkpoints(killed)[0].name == LAST
    for name in ("evaluation.json", "samples/final.png"):
        assert (straight / name).read_bytes() == (killed / name).read_bytes(), name


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_run_that_goes_on_with_another_number_of_processes_sees_the_same_samples(before: int, after: int) -> None:
    """Step by step the same set, in the same order, across the change at step 13; 30 steps are more than an epoch."""
    source = open_source(override(preset("digits"), {"batch_size": 96, "data.flip": True}))
    for step in range(30):
        world = before if step < 13 else after
        parts = [source.batch(step, rank, world) for rank in range(world)]
        images, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        whole = source.batch(step)
        assert torch.equal(images, whole[0]) and torch.equal(labels, whole[1]), step
        assert torch.equal(torch.cat([source.indices(step, r, world) for r in range(world)]), source.indices(step))
