"""Where a rank is, and whether it waits there: from the frames of real threads."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from soflow_fast.launch import Launch
from soflow_fast.runs.async_save import Saver
from soflow_fast.runs.ranks.agreement import Agreement
from soflow_fast.runs.ranks.place import place
from tests.forked import on_ranks

HERE = Path(__file__).name


def seen_during(work: Callable[[], Any]) -> tuple[str, bool]:
    """The place of this process, which a thread looks at while `work` goes on."""
    found = []
    looks = threading.Timer(0.2, lambda: found.append(place()))
    looks.start()
    work()
    looks.join()
    return found[0]


def waits_here(launch: Launch, how: str) -> tuple[str, bool]:
    """Rank 1 sleeps before it does what rank 0 waits for it in."""
    where = f"tcp://{launch.address}:{launch.port}"
    dist.init_process_group("gloo", init_method=where, rank=launch.rank, world_size=launch.world)
    agreement = Agreement()
    module = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))

    def work() -> None:
        agreement.reach(0, [])
        loss = module(torch.ones(1, 2)).sum()
        if launch.rank:
            time.sleep(0.6)
        if how == "backward":
            loss.backward()
        else:
            dist.barrier()

    def agree() -> None:
        if launch.rank:
            time.sleep(0.6)
        agreement.reach(0, [])

    return seen_during(agree if how == "agreement" else work)


@pytest.mark.parametrize("how", ["agreement", "backward", "barrier"])
def test_one_rank_waits_for_one_that_sleeps(how: str) -> None:
    (_, waits), (line, sleeps_waiting) = on_ranks(2, waits_here, how)
    assert waits and not sleeps_waiting
    assert line.startswith(HERE)


def test_of_a_save_the_writing_thread_counts(tmp_path: Path) -> None:
    saver: Any = Saver(tmp_path, 1, lambda text: None)
    saver._idle.clear()

    def write() -> None:
        time.sleep(0.5)
        saver._idle.set()

    def save() -> None:
        threading.Thread(target=write, name="checkpoint").start()
        saver.wait()

    line, waits = seen_during(save)
    assert line.startswith(HERE) and not waits
