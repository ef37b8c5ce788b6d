"""Which errors are causes, and how one is told in a line."""

import errno
from pathlib import Path

import torch
import torch.distributed as dist

from soflow_fast.config.schema import RunConfig
from soflow_fast.errors import ConfigError, Interrupted, StorageError, storage
from soflow_fast.launch import Launch
from soflow_fast.runs.checkpoint.together import together
from soflow_fast.runs.ranks.failure import Failure, described, from_json, kind_of
from soflow_fast.training.parallel import join
from tests.forked import on_ranks


def test_errors_of_connections_follow_from_other_ranks() -> None:
    text = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.1.1]:24567"
    assert kind_of(RuntimeError(text)) == kind_of(dist.DistBackendError("x")) == "lost"
    assert kind_of(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) == kind_of(KeyError("gloo")) == "error"
    assert kind_of(ConfigError("gloo")) == "error"
    assert kind_of(Interrupted(15)) == "signal"


def refused(launch: Launch, folder: Path) -> tuple[str, str]:
    """How a save ends where the disk of rank 1 is full."""

    def write() -> None:
        if launch.rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder / "part"))

    parallel = join(launch, RunConfig(parallel="ddp"), torch.device("cpu"))
    try:
        with storage("--run-dir runs: cannot save"):
            together(parallel, write)
    except StorageError as error:
        return kind_of(error), str(error)
    return "", ""


def test_what_the_disk_of_another_rank_refuses_is_told_by_that_rank(tmp_path: Path) -> None:
    (second_hand, told), (first_hand, own) = on_ranks(2, refused, tmp_path)
    assert (second_hand, first_hand) == ("lost", "error")
    assert own == f"--run-dir runs: cannot save: {tmp_path / 'part'}: No space left on device"
    assert told == own.replace("No space", "rank 1 (host1): No space")


def test_a_failure_in_a_line() -> None:
    failure = Failure(3, "gpu07", "--data x: is gone", 2, "error")
    assert from_json(failure.to_json()) == failure
    assert failure.line() == "error: rank 3 (gpu07): --data x: is gone"
    assert failure.line(common=True) == "error: --data x: is gone"
    kept = Failure(3, "gpu07", "KeyError: 'x'", 1, "error", "/w/soflow-rank-3-77.txt")
    assert kept.line() == "error: rank 3 (gpu07): KeyError: 'x'; its traceback is in /w/soflow-rank-3-77.txt"
    assert kept.alike() == Failure(2, "gpu07", "KeyError: 'x'", 1, "error", "/w/soflow-rank-2-76.txt").alike()
    assert Failure(3, "", "x", 2, "error").line() == "error: rank 3: x"
    told = Failure(3, "gpu07", "cannot save: rank 1 (gpu07): No space left on device", 2, "error")
    assert told.line() == "error: cannot save: rank 1 (gpu07): No space left on device"
    assert Failure(3, "gpu07", "stopped", 143, "signal").line() == "stopped"
    assert Failure(3, "gpu07", "", 0, "error").line() == ""


def test_an_error_of_the_program_says_where() -> None:
    try:
        from_json("{")
    except ValueError as error:
        text = described(error)
    assert text.startswith("JSONDecodeError: Expecting property name") and "(at failure.py:" in text
    assert described(ConfigError("--steps 0")) == "--steps 0"
    assert described(RuntimeError("one\ntwo")) == "RuntimeError: one"
