"""Fixtures of the tests of reliability: trainings that start quickly, and the number of rounds of costly ones."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.forked import free_port

WHOLE = os.environ.get("SOFLOW_SOAK") == "1"
STARTER = Path(__file__).with_name("starter.py")
TIMING = {"images_per_s", "seconds", "memory_mb"}


@pytest.fixture(scope="session")
def count() -> Callable[[int, int], int]:
    """`count(usual, whole)`: how often to do something costly, in the usual test run and with SOFLOW_SOAK=1."""
    return lambda usual, whole: whole if WHOLE else usual


class Training(NamedTuple):
    """A training in a process of its own."""

    pid: int
    output: Path
    ask: Callable[[dict[str, Any]], str]

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """The exit code, negative for the signal that killed it."""
        return int(self.ask({"wait": self.pid}))


class Starter:
    """Starts trainings by forking one process that has imported everything; see starter.py. `prefix`: what runs it."""

    def __init__(self, environment: dict[str, str], folder: Path, prefix: tuple[str, ...]) -> None:
        command = [*prefix, sys.executable, str(STARTER)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)
        assert self.process.stdout and self.process.stdout.readline() == "ready\n"
        self._folder, self._count = folder, 0

    def ask(self, request: dict[str, Any]) -> str:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()

    def __call__(
        self,
        *arguments: object,
        hang: str = "",
        slow: float = 0,
        output: Path | None = None,
        place: dict[str, str] | None = None,
        module: str = "train",
    ) -> Training:
        """output: a file that is there already, of whatever kind, in place of one of its own. place: variables that
        make it one of several ranks. module: another command line."""
        if output is None:
            output = self._folder / f"{self._count}.txt"
            self._count += 1
            output.touch()
        given = {"arguments": [*map(str, arguments)], "output": str(output), "hang": hang, "slow": slow}
        given |= {"place": place or {}, "module": module}
        return Training(int(self.ask(given)), output, self.ask)

    def trainings(self, world: int, *arguments: object, slow: float = 0) -> list[Training]:
        """One training on several ranks."""
        port, started = str(free_port()), []
        for rank in range(world):
            place = {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            started.append(self(*arguments, place=place, slow=slow))
        return started

    def ranks(self, world: int, folder: Path, **fault: Any) -> list[Training]:
        """Ranks of one_rank.py that meet each other. Their files lie in a folder, with what rank 3 prints in out-3."""
        port, started = free_port(), []
        for rank in range(world):
            place = {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            output = folder / f"out-{rank}"
            output.touch()
            given = [{name: str(value) for name, value in place.items()}, str(folder), fault]
            started.append(Training(int(self.ask({"rank": given, "output": str(output)})), output, self.ask))
        return started

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()  # which ends the starter, and with it whatever a failed test has left running
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="session")
def mounting() -> tuple[str, ...]:
    """The command that gives a process a mount namespace of its own, where it may mount a tmpfs; empty: none does."""
    for prefix in (("unshare", "--mount"), ("unshare", "-rm")):
        with tempfile.TemporaryDirectory() as place, contextlib.suppress(FileNotFoundError):
            mount = [*prefix, "mount", "-t", "tmpfs", "none", place]
            if not subprocess.run(mount, capture_output=True).returncode:
                return prefix
    return ()


@pytest.fixture(scope="session")
def started(
    environment: dict[str, str], mounting: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Starter]:
    """`started(*arguments)`: a training that has just begun, at the command line's first statement. A function of `os`
    called `hang` never returns in a thread of it; each fsync takes `slow` seconds more. Where that is permitted, it
    sees mounts that nobody else sees."""
    with contextlib.closing(Starter(environment, tmp_path_factory.mktemp("outputs"), mounting)) as starter:
        yield starter


@pytest.fixture(scope="session")
def until() -> Callable[..., Any]:
    """`until(condition)`: waits until it holds, and returns what it gave."""

    def until(condition: Callable[[], Any], milliseconds: int = 60_000) -> Any:
        for _ in range(milliseconds):
            found = condition()
            if found:
                return found
            time.sleep(0.001)
        raise AssertionError("it did not happen")

    return until


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without times and memory."""
    entries = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in entry.items() if name not in TIMING} for entry in entries]


@pytest.fixture(scope="session")
def logged() -> Callable[[Path], list[dict[str, Any]]]:
    """`logged(run_dir)`: the lines of metrics.jsonl, without times and memory."""
    return metrics
