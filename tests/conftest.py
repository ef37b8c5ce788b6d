"""Fixtures of the tests of command lines, runs and checkpoints: a tiny model, and ways to run commands."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # under nohup; processes that tests start would ignore it too
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = Path(__file__).resolve().parents[1]
TINY_FIELDS = {
    "model.hidden_size": 16,
    "model.depth": 1,
    "model.num_heads": 2,
    "run.log_every": 2,
    "run.sample_every": 10,
}
TINY = ["--device", "cpu", "--batch-size", "8", *(f"--set={name}={value}" for name, value in TINY_FIELDS.items())]
RUN = [*TINY, "--steps", "20", "--checkpoint-every", "5"]


class Result(NamedTuple):
    """The end of a command."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """The environment of commands run elsewhere than in the repository: both packages can be imported."""
    given = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    path = os.pathsep.join([*given, str(ROOT), str(ROOT / "kernels")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "120", "TERM": "xterm"}


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """Flags of `train` for a model that costs nothing, without a length."""
    return TINY


@pytest.fixture(scope="session")
def run_flags() -> list[str]:
    """Flags of `train` for the whole tiny run of `finished`."""
    return RUN


@pytest.fixture(scope="session")
def start(environment: dict[str, str]) -> Callable[..., subprocess.Popen]:
    """`start(module, *arguments, cwd=..., ...)`: a command line as a user starts it."""

    def start(module: str, *arguments: object, python: tuple[str, ...] = (), **settings: object) -> subprocess.Popen:
        command = [sys.executable, *python, "-m", f"soflow_fast.{module}", *map(str, arguments)]
        return subprocess.Popen(command, env=environment, **settings)  # type: ignore[arg-type]

    return start


@pytest.fixture(scope="session")
def command(start: Callable[..., subprocess.Popen]) -> Callable[..., Result]:
    """`command(module, *arguments, cwd=...)`: a command line in a process of its own, to its end."""

    def command(module: str, *arguments: object, cwd: Path) -> Result:
        process = start(module, *arguments, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            out, err = process.communicate(timeout=300)
        finally:
            process.kill()
        return Result(process.returncode, out, err)

    return command


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Result]]:
    """`call(module, *arguments)`: the same command line inside this process, which is quicker.

    With one thread, as in `environment`: the last bits of a sum depend on the number of threads.
    """
    import importlib

    import torch

    from soflow_fast.commands import process
    from soflow_fast.runs import signals

    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def call(module: str, *arguments: object) -> Result:
        main = importlib.import_module(f"soflow_fast.{module}").main
        capfd.readouterr()
        handlers = {number: signal.getsignal(number) for number in signals.SIGNALS}
        try:
            with pytest.raises(SystemExit) as ended:
                process.run(lambda: main([str(argument) for argument in arguments]))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        out, err = capfd.readouterr()
        return Result(int(ended.value.code or 0), out, err)

    yield call
    torch.set_num_threads(threads)


@pytest.fixture
def refused(call: Callable[..., Result]) -> Callable[..., str]:
    """`refused(module, *arguments)`: checks exit code 2 and a single line on stderr, and returns the line."""

    def refused(module: str, *arguments: object) -> str:
        result = call(module, *arguments)
        assert result.code == 2, result
        assert result.err.endswith("\n") and result.err.count("\n") == 1, result.err
        assert result.err.startswith("soflow: error: "), result.err
        return result.err

    return refused


class Finished(NamedTuple):
    """A run that went to its end by itself, and what it printed."""

    folder: Path
    result: Result


@pytest.fixture(scope="session")
def finished(command: Callable[..., Result], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The tiny run, in a process of its own, in its default run directory. Not to be written to: see `run_dir`."""
    home = tmp_path_factory.mktemp("home")
    result = command("train", *RUN, cwd=home)
    assert result.code == 0, result
    return Finished(home / "runs" / "digits", result)


@pytest.fixture
def run_dir(finished: Finished, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished.folder, tmp_path / "runs" / "digits"))


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """`mount(options)`: a small file system in memory; the test is skipped where mounting is not permitted."""
    places: list[Path] = []

    def mount(options: str, name: str = "disk") -> Path:
        place = tmp_path / name
        place.mkdir(exist_ok=True)
        tool = shutil.which("mount")
        arguments = ["-t", "tmpfs", "-o", options, "none", str(place)]
        if not tool or subprocess.run([tool, *arguments], capture_output=True).returncode:
            pytest.skip("mounting is not permitted here")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", "-l", str(place)], check=True)


def files_under(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path, with its bytes."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture
def files() -> Callable[[Path], dict[str, bytes]]:
    """`files(folder)`: every file below it, with its bytes."""
    return files_under


@pytest.fixture
def damage() -> Callable[[Path], None]:
    """`damage(path)`: flips one bit in the middle of a file."""

    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)

    return damage
