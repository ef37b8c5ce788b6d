"""Ranks of a process group as forks of the test's process: each is there in a tenth of a second."""

import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo  # DDP and FSDP2 import it, and take more than a second: once here, not in every rank

from soflow_fast.launch import Launch

SERVED = torch.cuda.is_available()
"""Where a GPU is, no fork of a process that has made a backward can make another: ranks are then forks of a server,
which has torch and no GPU. Functions and what they return must be importable by name."""
PATIENCE = 300.0
"""Seconds that a rank may take in all."""


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class _Crashed(AssertionError):
    """A rank ended by a fault of its memory."""


def on_ranks(world: int, function: Callable[..., Any], *given: Any) -> list[Any]:
    """What `function(launch, *given)` returns in each of `world` processes. Fails with the traceback of one that
    raised. Results are copied: tensors, numbers, containers of them.

    Once in some thousand times torch 2.13's own gathering by gloo crashes in a fork: then all begin anew, once.
    """
    try:
        return _on_ranks(world, function, *given)
    except _Crashed as error:
        print(f"{error}; once more", file=sys.stderr)
        return _on_ranks(world, function, *given)


def _on_ranks(world: int, function: Callable[..., Any], *given: Any) -> list[Any]:
    context = _server() if SERVED else multiprocessing.get_context("fork")
    port, ends, processes = free_port(), [], []
    for rank in range(world):
        launch = Launch(rank, world, rank, world, "127.0.0.1", port, f"host{rank}")
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(there, function, launch, given), daemon=True)
        process.start()
        there.close()
        ends.append(here)
        processes.append(process)
    found: list[Any] = []
    try:
        for rank, end in enumerate(ends):
            if not end.poll(PATIENCE):
                raise AssertionError(f"rank {rank} of {world} did not end in {PATIENCE} s")
            try:
                well, content = end.recv()
            except EOFError:
                processes[rank].join(10)
                kind = _Crashed if processes[rank].exitcode == -signal.SIGSEGV else AssertionError
                raise kind(f"rank {rank} of {world} ended with {processes[rank].exitcode}") from None
            assert well, f"rank {rank} of {world}:\n{content}"
            found.append(pickle.loads(content))
    finally:
        for process in processes:
            process.kill()
            process.join()
    return found


def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        multiprocessing.forkserver.ensure_running()
    return context


def _work(end: Any, function: Callable[..., Any], launch: Launch, given: tuple) -> None:
    os.environ |= {"RANK": str(launch.rank), "WORLD_SIZE": str(launch.world), "LOCAL_RANK": str(launch.local_rank)}
    torch.set_num_threads(1)
    try:
        # By value: torch would hand its tensors over through files that go with this process.
        result = True, pickle.dumps(function(launch, *given))
    except BaseException:
        result = False, traceback.format_exc()
    end.send(result)
    end.recv()  # wait to be killed: whoever ended first would take its connections from the others
