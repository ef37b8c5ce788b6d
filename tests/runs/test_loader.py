"""Batches read ahead by processes: the same ones, whatever becomes of the processes."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from soflow_fast.data import Dataset, InMemory, Source
from soflow_fast.errors import DataError
from soflow_fast.runs.batches import loader
from soflow_fast.runs.batches.loader import AHEAD, Ahead, Reader, workers_for
from tests.data.numbered import Numbers


class Here(Numbers):
    def read(self, index: torch.Tensor, mirrored: torch.Tensor | None = None) -> torch.Tensor:
        return torch.full((len(index), 1), os.getpid())


def source(dataset: Dataset, **settings: object) -> Source:
    return Source(dataset, seed=3, batch_size=6, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_workers_and_restarts_change_nothing(workers: int) -> None:
    whole = source(Numbers(20), flip=True)
    reader = Reader(whole, rank=1, world=2, workers=workers)
    for step in (0, 1, 2, 3, 4, 9, 10, 5, 6):
        for got, wanted in zip(reader.read(step), whole.raw(step, 1, 2), strict=True):
            assert torch.equal(got, wanted)
    reader.close()


def test_samples_are_read_by_other_processes_unless_they_lie_in_memory() -> None:
    found = Reader(source(Here(20))).read(0)[0]
    assert int(found[0]) != os.getpid()
    images = InMemory(torch.zeros(20, 1, 2, 2, dtype=torch.uint8), torch.zeros(20, dtype=torch.int64))
    assert Reader(source(images)).workers == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_read_ahead_has_an_end_and_a_bound(workers: int) -> None:
    asked = []
    ahead = Ahead(lambda k: k * k, workers, "lost")
    assert ahead._pool is None
    found = ahead.results(asked.append(k) or k for k in range(9))
    for k in range(9):
        assert next(found) == k * k and len(asked) <= k + max(AHEAD * workers, 1)
    assert list(found) == [] and list(ahead.results([])) == [] and list(ahead.results([5])) == [25]
    ahead.close()


def test_how_many_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader.os, "sched_getaffinity", lambda pid: set(range(20)))
    numbers = Numbers(20)
    assert [workers_for(numbers, devices=n) for n in (1, 2, 3)] == [8, 16, 19]
    assert workers_for(numbers, 5, devices=2) == 5 and workers_for(numbers, 0) == 0


def test_a_worker_without_shared_memory_is_told_in_one_line() -> None:
    def read(text: str) -> None:
        raise RuntimeError(text)

    with Ahead(read, 1, "lost") as ahead:
        with pytest.raises(DataError, match=r"^lost$"):
            list(ahead.results(["unable to allocate shared memory(shm) for file </torch_1>: No space left on device"]))
        with pytest.raises(RuntimeError, match=r"^another$"):
            list(ahead.results(["another"]))


def test_an_error_of_a_worker_is_the_line_that_it_is() -> None:
    reader = Reader(source(Numbers(20, bad=13)), workers=2)
    with pytest.raises(DataError) as error:
        for step in range(4):
            reader.read(step)
    assert str(error.value) == "--data x: 13 is damaged"


def test_a_worker_that_is_killed_is_told_in_one_line() -> None:
    reader = Reader(source(Here(20), place="there"), workers=1)
    pid = int(reader.read(0)[0][0])
    os.kill(pid, signal.SIGINT)  # is for the process that trains
    assert int(reader.read(1)[0][0]) == pid
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"^--data there: a process that reads it was killed") as error:
        for step in range(2, 200):
            reader.read(step)
    assert "\n" not in str(error.value)


def test_a_pool_that_has_lost_a_worker_does_not_wait_for_the_others() -> None:
    reader = Reader(source(Here(20)), workers=3)
    os.kill(int(reader.read(0)[0][0]), signal.SIGKILL)
    with pytest.raises(DataError):
        for step in range(1, 5000):
            reader.read(step)
            time.sleep(0.002)  # the others go on until the pool has noticed
    processes = reader._ahead._forks._made
    reader.close()
    ended = {process.exitcode for process in processes}
    assert -signal.SIGKILL in ended and ended <= {-signal.SIGKILL, 0}, "and none by the alarm of `serve`"


def test_closing_ends_the_workers() -> None:
    reader = Reader(source(Here(20)), workers=2)
    pids = {int(reader.read(step)[0][0]) for step in range(4)}
    reader.close()
    for _ in range(200):
        if not any(_alive(str(pid)) for pid in pids):
            break
        time.sleep(0.05)
    assert pids and not any(_alive(str(pid)) for pid in pids)


def test_workers_end_with_a_process_that_is_killed(tmp_path) -> None:
    told = tmp_path / "pids"
    pid = os.fork()
    if pid == 0:
        reader = Reader(source(Here(20)), workers=2)
        told.write_text(" ".join(str(int(reader.read(step)[0][0])) for step in range(6)))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    workers = set(told.read_text().split())
    for _ in range(200):
        if not any(_alive(worker) for worker in workers):
            break
        time.sleep(0.05)
    assert workers and not any(_alive(worker) for worker in workers)


def _alive(pid: str) -> bool:
    """Whether a process is there and no zombie, as nobody may wait for it here."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
