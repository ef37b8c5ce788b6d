"""Whole trainings on several ranks: stopped, killed, begun again on other numbers of them, loaded by one process."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from soflow_fast import load
from soflow_fast.runs.checkpoint import list_checkpoints

HOST = r"\([^ )]+\)"
STEPS = 40
LENGTH = ["--steps", STEPS, "--checkpoint-every", "10", "--set=optim.lr=1e-4", "--set=run.sample_every=0"]


def finished(ranks: list[Any]) -> tuple[list[int], list[str], str]:
    """Exit codes, our lines on stderr, and all that was printed."""
    codes = [training.wait() for training in ranks]
    text = "".join(training.output.read_text() for training in ranks)
    assert "Traceback" not in text, text
    return codes, re.findall("^soflow: .*", text, re.M), text


def weights(run: Path) -> torch.Tensor:
    return torch.cat([p.flatten() for p in load(run).parameters()])


def saved_steps(run: Path) -> list[int]:
    return [int(folder.name[-8:]) for folder in list_checkpoints(run)]


def has_saved(run: Path, step: int) -> Callable[[], bool]:
    return lambda: any(saved >= step for saved in saved_steps(run))


@pytest.fixture(scope="module")
def whole(started: Any, tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """The weights of a run that one process makes without a stop."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert started(*tiny, *LENGTH, "--run-dir", run).wait() == 0
    return weights(run)


def same(run: Path, whole: torch.Tensor) -> bool:
    found = weights(run)
    return float((found - whole).abs().max()) < 1e-5 * float(whole.abs().max())


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ((2, "ddp"), (1, "ddp")),
        ((2, "fsdp"), (2, "ddp")),
        pytest.param((1, "ddp"), (2, "fsdp"), marks=pytest.mark.slow),
        pytest.param((4, "hsdp"), (2, "fsdp"), marks=pytest.mark.slow),
        pytest.param((4, "fsdp"), (4, "ddp"), marks=pytest.mark.slow),
    ],
    ids=lambda how: f"{how[0]}-{how[1]}",
)
def test_a_signal_to_one_rank_saves_once_and_other_ranks_go_on(
    first: tuple[int, str],
    then: tuple[int, str],
    started: Any,
    until: Any,
    tiny: list[str],
    tmp_path: Path,
    whole: torch.Tensor,
) -> None:
    run = tmp_path / "run"

    def begin(world: int, kind: str) -> list[Any]:
        shards = ["--set=run.shard_ranks=2"] if kind == "hsdp" else []
        flags = [*tiny, *LENGTH, "--run-dir", run, "--parallel", kind, *shards]
        return started.trainings(world, *flags) if world > 1 else [started(*flags)]

    ranks = begin(*first)
    until(has_saved(run, 10))
    ranks[-1].kill(signal.SIGTERM)
    codes, lines, text = finished(ranks)
    newest = saved_steps(run)[0]
    if newest < STEPS:  # else the signal came too late
        assert codes == [143] * first[0]
        assert lines == [f"soflow: stopped and saved at step {newest} of {STEPS}; the same command resumes"], text
    codes, lines, text = finished(begin(*then))
    assert codes == [0] * then[0] and not lines
    if newest < STEPS:
        assert text.count(f"resuming {run} at step {newest} of {STEPS}") == 1
    assert saved_steps(run)[0] == STEPS and same(run, whole)


def test_a_signal_to_one_rank_as_the_last_step_is_saved_stops_all(
    started: Any, until: Any, tiny: list[str], tmp_path: Path
) -> None:
    """No step is left in which the others would be told, and all have to draw the last samples together."""
    run, steps = tmp_path / "run", 6
    ranks = started.trainings(2, *tiny, "--steps", steps, "--run-dir", run, "--parallel", "fsdp", slow=0.2)
    until(lambda: any((run / "checkpoints").glob(".*partial*")))
    ranks[1].kill(signal.SIGTERM)
    codes, lines, text = finished(ranks)
    assert codes == [143, 143], text
    assert lines == [f"soflow: stopped and saved at step {steps} of {steps}; the same command resumes"]
    assert saved_steps(run) == [steps]


def test_a_rank_that_is_killed_ends_the_run_and_the_same_command_goes_on(
    started: Any, until: Any, tiny: list[str], tmp_path: Path, whole: torch.Tensor
) -> None:
    run = tmp_path / "run"
    flags = [*tiny, *LENGTH, "--run-dir", run]
    ranks = started.trainings(2, *flags, slow=0.05)  # so that it is killed while a checkpoint is written
    until(has_saved(run, 10))
    ranks[1].kill(signal.SIGKILL)
    codes, lines, text = finished(ranks)
    assert codes == [1, -signal.SIGKILL]
    assert len(lines) == 1 and re.match(rf"soflow: error: rank 1 {HOST}: .*lost|.*died", lines[0]), text
    codes, lines, text = finished(started.trainings(2, *flags))
    assert codes == [0, 0] and not lines and "resuming" in text
    assert same(run, whole)


def test_data_that_one_rank_cannot_read_end_the_run_with_all_saved(
    started: Any, tiny: list[str], tmp_path: Path
) -> None:
    h5py = pytest.importorskip("h5py")
    looked_at = set((torch.arange(64) * 65 // 63).tolist())
    bad = next(row for row in range(66) if row not in looked_at)  # by the identity, at the start
    latents = np.random.default_rng(0).random((66, 8, 4, 4), np.float32)
    latents[bad] = np.nan
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["latents"], file["labels"] = latents, np.arange(66) % 3
    sizes = ["model.input_size=4", "model.patch_size=2", "model.in_channels=4"]
    run = tmp_path / "run"
    ranks = started.trainings(
        *(2, "imagenet256-b2", *tiny, *(f"--set={size}" for size in sizes), "--steps", "50", "--precision", "fp32"),
        *("--data", tmp_path / "a.hdf5", "--run-dir", run, "--set=run.workers=0", "--set=data.flip=false"),
    )
    codes, lines, text = finished(ranks)
    assert codes == [2, 2], text
    assert len(lines) == 1 and f"a.hdf5, latent {bad}, is not finite in float16" in lines[0], text
    assert re.match(rf"soflow: error: rank [01] {HOST}: --data ", lines[0])
    assert len(saved_steps(run)) == 1 and 0 < saved_steps(run)[0] < 17


@pytest.mark.slow
def test_torchrun_restarts_a_run_that_goes_on_exactly(
    started: Any, environment: dict[str, str], until: Any, tiny: list[str], tmp_path: Path
) -> None:
    """A rank is killed after a checkpoint, and the run ends with the bits of one that nobody killed."""
    flags = [*tiny, *map(str, LENGTH), "--parallel", "fsdp", "--run-dir"]
    codes, _, text = finished(started.trainings(2, *flags, tmp_path / "plain"))
    assert codes == [0, 0], text
    own = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "-m", "soflow_fast.train"]
    command = [sys.executable, "-m", "torch.distributed.run", *own, *flags, str(tmp_path / "killed")]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as torchrun:
        until(has_saved(tmp_path / "killed", 10))
        children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
        workers = [int(pid) for pid in children if b"RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
        os.kill(workers[0], signal.SIGKILL)
        out, _ = torchrun.communicate(timeout=300)
    assert torchrun.returncode == 0 and "resuming" in out
    assert torch.equal(weights(tmp_path / "killed"), weights(tmp_path / "plain"))
