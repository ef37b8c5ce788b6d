"""Several ranks write a checkpoint: beside the steps, and where it fails for one of them, for all. No end of a rank
costs one."""

import errno
import multiprocessing
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from soflow_fast import load
from soflow_fast.errors import ConfigError, Diverged, StorageError
from soflow_fast.launch import Launch
from soflow_fast.runs import checkpoint, run_directory
from soflow_fast.runs.async_save import Saver
from soflow_fast.runs.checkpoint import folder as folders
from soflow_fast.runs.checkpoint import sharded
from tests.forked import free_port, on_ranks
from tests.ranked_states import CHANGES, fill, joined, state_of
from tests.states import build


def alternately(launch: Launch, folder: Path) -> tuple[list[float], list[str]]:
    """Saves in the background while the main threads exchange numbers, and change the state."""
    parallel = joined(launch, "ddp")
    state, sums = state_of(parallel), []
    with Saver(folder, 2, pytest.fail, parallel=parallel) as saver:
        for state.step in (1, 2, 3):
            fill(state, state.step)
            saver.begin(state)
            for k in range(20):
                value = torch.tensor(float(parallel.rank + k))
                dist.all_reduce(value)
                sums.append(float(value))
            fill(state, 100)
    parallel.texts("")  # until the first has removed what is too old
    return sums, [found.name for found in checkpoint.list_checkpoints(folder)]


def test_saves_go_on_beside_the_steps(tmp_path: Path) -> None:
    for sums, names in on_ranks(2, alternately, tmp_path):
        assert sums == 3 * [2.0 * k + 1 for k in range(20)]
        assert names == ["step-00000003", "step-00000002"], "the two newest stay"
    for step in (2, 3):
        flow = load(checkpoint.directory(tmp_path) / f"step-{step:08d}")
        assert all(bool((p == step).all()) for p in flow.parameters())


@contextmanager
def refusing(where: str) -> Iterator[None]:
    """In it the disk refuses what this process writes, or reads again."""
    if where == "write":
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sharded, "sha256", refused)
            yield


def refused(*given: Any) -> Any:
    raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), "x")


def failing_once(launch: Launch, folder: Path, where: str) -> tuple[list[str], list[str], list[str]]:
    """The save of step 2 is refused on rank 1."""
    parallel = joined(launch, "ddp")
    state, said, left = state_of(parallel), [], []

    def failing() -> bool:
        return parallel.rank == 1 and state.step == 2

    def before(warn: Callable[[str], None]) -> None:
        if where == "before" and failing():
            refused()

    with Saver(folder, 2, said.append, before, parallel) as saver:
        for state.step in (1, 2, 3):
            fill(state, state.step)
            with refusing(where) if failing() and where != "before" else nullcontext():
                saver.begin(state)
                saver.wait()
            left += [path.name for path in checkpoint.directory(folder).glob(".partial-*") if not parallel.rank]
            parallel.texts("")  # until the first has looked
    return said, left, [found.name for found in checkpoint.list_checkpoints(folder)]


@pytest.mark.parametrize("where", ["before", "write", "hash"])
def test_a_disk_that_refuses_one_rank_costs_an_interval(where: str, tmp_path: Path) -> None:
    (first, left, names), (own, _, _) = on_ranks(2, failing_once, tmp_path, where)
    assert left == [] and names == ["step-00000003", "step-00000001"]
    assert len(first) == len(own) == 1
    begin = "checkpoint of step 2 not saved: [Errno 27] "
    assert first[0].startswith(f"{begin}rank 1 (host1): File too large")
    assert own[0].startswith(f"{begin}File too large")


def apart(launch: Launch, folder: Path) -> str:
    state = state_of(joined(launch, "ddp"))
    with pytest.raises(OSError, match="do they share the file system") as error:
        checkpoint.save(folder / str(launch.rank), state)
    return str(error.value)


def test_a_checkpoint_of_which_the_first_rank_does_not_see_all_is_none(tmp_path: Path) -> None:
    own, other = on_ranks(2, apart, tmp_path)
    assert f"{tmp_path / '0' / 'checkpoints'}/.partial-" in own and "shard-00002" in own and "rank 0 (host0)" in other
    assert not any(checkpoint.list_checkpoints(tmp_path / name) for name in ("0", "1"))


def ending(launch: Launch, folder: Path, how: str) -> list[str]:
    """Rank 1 ends a save in another way than the disk's."""
    parallel = joined(launch, "ddp")
    state, said = state_of(parallel), []
    fill(state, 1)
    if how == "nan":
        if parallel.rank:
            with torch.no_grad():
                next(state.ema.parameters()).view(-1)[3] = float("nan")
        with pytest.raises(Diverged) as error:
            checkpoint.save(folder, state)
        return [str(error.value)]
    saver = Saver(folder, 2, said.append, parallel=parallel)
    if how == "abandoned" and parallel.rank:
        saver._abandoned = True
    if how == "ours" and parallel.rank:
        saver.before = lambda warn: (_ for _ in ()).throw(ValueError("ours"))
    try:
        saver.begin(state)
        saver.wait()
    except Exception as error:
        said.append(f"{type(error).__name__}: {error}")
    parallel.texts("")  # until the first has cleaned up
    return [*said, *os.listdir(checkpoint.directory(folder))]


def test_a_number_that_is_not_finite_on_one_rank_is_every_ranks_end(tmp_path: Path) -> None:
    first, other = on_ranks(2, ending, tmp_path, "nan")
    assert first == other and len(first) == 1
    assert first[0].startswith("rank 1 (host1): ema: network.") and "not finite after step 0" in first[0]
    assert not checkpoint.list_checkpoints(tmp_path)


def test_a_save_that_one_rank_abandons_is_none(tmp_path: Path) -> None:
    assert on_ranks(2, ending, tmp_path, "abandoned") == [
        ["checkpoint of step 0 not saved: rank 1 (host1): interrupted"],
        [],
    ]


def test_a_fault_of_ours_on_one_rank_ends_all(tmp_path: Path) -> None:
    wanted = [["ElsewhereError: another rank has failed"], ["ValueError: ours"]]
    assert on_ranks(2, ending, tmp_path, "ours") == wanted


# Kills


def moments(rank: int, die: Callable[[], None], at: int) -> list[str]:
    """Let this rank die at the `at`-th of the moments of a save; returns their names as they come."""
    seen: list[str] = []

    def before(module: Any, name: str) -> None:
        plain = getattr(module, name)

        def watched(*given: Any, **settings: Any) -> Any:
            seen.append(name)
            if len(seen) == at:
                die()
            return plain(*given, **settings)

        setattr(module, name, watched)

    for module, name in (
        (sharded, "together"),
        (sharded, "begin"),
        (sharded, "sha256"),
        (sharded.dcp, "save"),
        (sharded._Writer, "write_data"),
        (os, "fsync"),
        (folders.os, "rename"),
        (shutil, "rmtree"),
    ):
        before(module, name)
    return seen


def killed(launch: Launch, folder: Path, victim: int, at: int, end: Any) -> None:
    """Saves step 1 and then step 2, in which the victim dies."""
    parallel = joined(launch, "ddp")
    state = state_of(parallel)
    fill(state, 1)
    state.step = 1
    checkpoint.save(folder, state)
    fill(state, 2)
    state.step = 2
    content = checkpoint.snapshot(state)
    seen = moments(launch.rank, lambda: os.kill(os.getpid(), signal.SIGKILL), at if launch.rank == victim else 0)
    try:
        checkpoint.write(folder, content, 1)
        end.send((seen, ""))
    except Exception as error:
        end.send((seen, f"{type(error).__name__}: {error}"))
    end.recv()


def kill_in_a_save(folder: Path, victim: int, at: int) -> tuple[list[str], str] | None:
    """What the survivor saw and its error; None if nobody died."""
    context = multiprocessing.get_context("fork")
    port, ends, processes = free_port(), [], []
    for rank in range(2):
        here, there = context.Pipe()
        launch = Launch(rank, 2, rank, 2, "127.0.0.1", port, f"host{rank}")
        process = context.Process(target=killed, args=(launch, folder, victim, at, there), daemon=True)
        process.start()
        there.close()
        ends.append(here)
        processes.append(process)
    try:
        processes[victim].join(0.01)
        assert ends[1 - victim].poll(60), "the survivor waits for the dead"
        found = ends[1 - victim].recv()
        if ends[victim].poll(5):
            try:
                ends[victim].recv()
                return None
            except EOFError:
                pass
        processes[victim].join(60)
        assert processes[victim].exitcode == -signal.SIGKILL
        return found
    finally:
        for process in processes:
            process.kill()
            process.join()


def assert_no_checkpoint_lost(folder: Path, survived: tuple[list[str], str]) -> int:
    """The step of the checkpoint that is there, whole; the next start removes the rest."""
    newest = checkpoint.list_checkpoints(folder)[0]
    step = int(newest.name[-8:])
    for found in checkpoint.list_checkpoints(folder):
        assert all(bool((p == int(found.name[-8:])).all()) for p in load(found).parameters())
    state = build(**CHANGES)
    assert checkpoint.resume(folder, state, pytest.fail) and state.step == step
    assert all(path.name.startswith("step-") for path in checkpoint.directory(folder).iterdir())
    return step


@pytest.mark.parametrize(("victim", "at"), [(0, 2), (0, 9), (1, 3), (1, 6)])
def test_a_kill_of_one_rank_loses_no_checkpoint(victim: int, at: int, tmp_path: Path) -> None:
    survived = kill_in_a_save(tmp_path, victim, at)
    assert survived is not None and "RuntimeError" in survived[1], "a save ended well without one of its ranks"
    assert assert_no_checkpoint_lost(tmp_path, survived) == 1


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_kill_of_one_rank_at_every_moment_loses_no_checkpoint(victim: int, tmp_path: Path) -> None:
    steps: list[int] = []
    for at in range(1, 100):
        folder = tmp_path / str(at)
        survived = kill_in_a_save(folder, victim, at)
        if survived is None:
            break
        steps.append(assert_no_checkpoint_lost(folder, survived))
    assert len(steps) > 10 and steps[0] == 1 and steps == sorted(steps), "it is there from some moment on"
    assert victim == 1 or steps[-1] == 2


# The place


def look(launch: Launch, folder: Path, apart: bool) -> str:
    parallel = joined(launch, "ddp")
    run_directory.LOOKS = 2
    try:
        run_directory.check_shared(folder / str(launch.rank if apart else 0), parallel)
    except ConfigError as error:
        return str(error)
    return ""


def test_a_directory_that_hosts_do_not_share_is_refused_by_all(tmp_path: Path) -> None:
    for name in ("0", "1"):
        (tmp_path / name).mkdir()
    assert on_ranks(2, look, tmp_path, False) == ["", ""]
    for rank, said in enumerate(on_ranks(2, look, tmp_path, True)):
        assert said.startswith(
            f"--run-dir {tmp_path / str(rank)}: rank 1 (host1) does not see what rank 0 (host0) writes there"
        )
    assert [*tmp_path.glob("*/*")] == []


def look_but_not_write(launch: Launch, folder: Path) -> str:
    parallel = joined(launch, "ddp")
    if launch.rank == 1:
        Path.touch = refuse  # type: ignore[method-assign]
    try:
        run_directory.check_shared(folder, parallel)
    except StorageError as error:
        return str(error)
    return ""


def refuse(path: Path, *given: Any) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))


def test_a_directory_that_one_rank_cannot_write_is_refused_at_the_start(tmp_path: Path) -> None:
    for said in on_ranks(2, look_but_not_write, tmp_path):
        assert said.startswith(f"--run-dir {tmp_path}: ") and "Read-only file system" in said
