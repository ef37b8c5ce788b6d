"""The benchmarks' command lines: mistakes are one line, commands are recorded as typed, nothing measured is lost."""

import contextlib
import importlib
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from benchmarks.harness import ceilings, command
from benchmarks.harness.cases import Case
from benchmarks.report import compare, pages, record
from benchmarks.report.blocks import quality
from benchmarks.studies import (
    book,
    derivative,
    digits,
    discrete,
    distance,
    equal_work,
    guidance,
    increments,
    mixtures,
    mixtures_central,
    plan,
    policies,
    precision,
    prediction,
    quality_for_time,
    sampling,
    scaling,
    soak,
    step,
    sweeps,
    tokens,
)
from soflow_fast.config.schema import Config
from soflow_fast.errors import StorageError, UserError
from tests.benchmarks.tiny import CONFIG

MODULES = [
    book, derivative, digits, discrete, distance, equal_work, guidance, increments, mixtures, mixtures_central, plan,
    policies, precision, prediction, quality_for_time, sampling, scaling, step, sweeps, tokens,
]  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(committed, monkeypatch, tmp_path):
    """Records go elsewhere."""
    monkeypatch.setattr(record, "RECORDS", tmp_path / "records")


MISTAKES = [
    (quality_for_time, "--seeds -1", "--seeds"),
    (quality_for_time, "--seeds 0 0", "--seeds"),
    (quality_for_time, "--steps 0", "--steps"),
    (quality_for_time, "--every 0", "--every"),
    (quality_for_time, "--workers 99999999999999999999", "--workers"),
    *((module, f"--workers {number}", "--workers")
      for module in (discrete, equal_work, mixtures, mixtures_central, policies, precision, quality_for_time, tokens)
      for number in (0, 5000)),
    (mixtures_central, "--seeds 0 0", "--seeds"),
    (policies, "--seeds 0 0", "--seeds"),
    (policies, "--steps 0", "--steps"),
    (digits, "--seeds -1", "--seeds"),
    (digits, "--seeds 9223372036854775808", "--seeds"),
    (digits, "--seeds 1.5", "--seeds"),
    (digits, "--seeds 3 3", "--seeds"),
    (guidance, "--seeds 3 3", "--seeds"),
    (guidance, "--steps 0", "--steps"),
    (precision, "--seeds -1", "--seeds"),
    (precision, "--steps 0", "--steps"),
    (precision, "--r-end 0", "--r-end"),
    (precision, "--r-end nan", "--r-end"),
    (precision, "--r-end 1.5", "--r-end"),
    (precision, "--recipes other", "--recipes"),
    (distance, "--steps 0", "--steps"),
    (distance, "--wide-steps x", "--wide-steps"),
    (derivative, "--steps 0", "--steps"),
    *((module, f"--seconds {value}", "--seconds")
      for module in (derivative, increments, sampling, scaling, step, sweeps)
      for value in ("inf", "nan", "-1", "soon", "1e300")),
    *((module, f"--within {value}", "--within") for module in (sampling, step, sweeps) for value in
      ("inf", "nan", "-1")),
    (sampling, "--secnds 3", "--secnds"),
    *((scaling, f"--ranks {value}", "--ranks") for value in ("0", "x", "1,,2", "2,2", "3", "64")),
    *((scaling, f"--parallel {value}", "--parallel") for value in ("hsdp", "ddp,ddp", "ddp,")),
    (prediction, "--gpu h100", "--gpu"),
    (plan, "--gpus 8", "--gpus"),
    (soak, "--rounds 3", "--rounds"),
    (ceilings, "--fast", "--fast"),
    (ceilings, "now", "now"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "typed", "flag"), MISTAKES, ids=lambda value: getattr(value, "__name__", value))
def test_mistakes_are_one_line_that_names_the_flag(module, typed, flag, monkeypatch):
    def begin() -> dict:
        raise AssertionError("something was begun")

    monkeypatch.setattr(record, "begin", begin)
    with pytest.raises(UserError) as error:
        module.main(typed.split())
    assert flag in str(error.value) and "\n" not in str(error.value)


def shell(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(record.ROOT), str(record.ROOT / "kernels")])
    names = os.environ | {"PYTHONPATH": path} | environment
    return subprocess.run([sys.executable, *arguments], env=names, cwd=record.ROOT, capture_output=True, text=True)


def test_exit_code_of_a_mistake():
    found = shell("-m", "benchmarks.precision", "--steps", "0")
    said = "soflow: error: argument --steps: must be from 1 to 1000000000, got 0\n"
    assert (found.returncode, found.stdout, found.stderr) == (2, "", said)


@pytest.mark.parametrize("code", [None, 0, 1])
def test_exit_code_of_a_command(code, monkeypatch):
    monkeypatch.setattr(command.process, "run", lambda main: main())
    if not code:
        assert command.run(lambda: code) is None
    else:
        with pytest.raises(SystemExit) as ended:
            command.run(lambda: code)
        assert ended.value.code == code


NAMES = (
    "book", "ceilings", "derivative", "digits", "discrete", "distance", "equal_work", "gpu", "guidance", "increments",
    "mixtures", "mixtures_central", "plan", "policies", "precision", "prediction", "quality_for_time", "reading",
    "sampling", "scaling", "soak", "step", "sweeps", "tokens",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_commands_keep_their_names(name):
    """The module of each name, as typed and as in records, hands on to the study."""
    main = importlib.import_module(f"benchmarks.{name}").main
    assert main.__module__ in (f"benchmarks.studies.{name}", f"benchmarks.harness.{name}")
    assert f"python -m benchmarks.{name}" in str(sys.modules[main.__module__].__doc__)


def test_commands_of_the_records_are_still_there():
    commands = {run["command"] for run in map(record.read, record.HOME.glob("*.json")) if "benchmark" in run}
    modules = {words[2] for words in map(str.split, commands) if words[:2] == ["python", "-m"]}
    assert modules and all(importlib.util.find_spec(module) for module in modules)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_where_nothing_can_be_written_nothing_is_measured(module, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(record, "RECORDS", tmp_path / "file")
    for name in ("run", "cases", "sweep", "quality", "predictions"):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, None)  # whoever calls it fails
    with pytest.raises(StorageError, match=r"SOFLOW_RECORDS: .*/file"):
        module.main([])


@pytest.fixture
def tiny(monkeypatch):
    """Two networks to sample from and to time, without a compiler."""
    for module in (sampling, increments):
        monkeypatch.setattr(module, "cases", lambda: [Case(name, CONFIG) for name in ("one", "other")])
    monkeypatch.setattr(sampling.shutil, "which", lambda name: None)
    monkeypatch.setattr(sampling, "LARGE", {"cpu": 3})
    config = sweeps.network("cpu", batch=4, hidden=16, depth=1, heads=2, side=4)
    monkeypatch.setattr(sweeps, "sweep", lambda: sweeps.Sweep(config, (4, 8), (1,), ()))


@contextlib.contextmanager
def threads(number: int):
    """In place of processes."""
    with ThreadPoolExecutor(1) as pool:
        yield pool


def trained(*_: object) -> dict:
    points = [{"step": 2, "seconds": 1.0, "frechet": 30.0, "accuracy": 0.9}]
    return {"method": "ours", "seed": 0, "seconds": 1.0, "recipe": "x", "r_end": 0.1, "nfe": {}, "points": points}


@pytest.mark.parametrize(
    ("module", "typed"),
    [
        (sampling, "--seconds 0.01"),
        (sweeps, "--seconds 0 --within 600"),
        (increments, "--seconds 0"),
        (digits, "--seeds 3 1"),
        (distance, "--steps 2"),
        (precision, "--seeds 1 --recipes float32 'bf16, increments' --r-end 0.1 --steps 2 --workers 1"),
        (quality_for_time, "--seeds 1 --steps 2 --every 1"),
    ],
)
def test_the_command_is_recorded_as_it_was_typed(module, typed, tiny, monkeypatch, capsys):
    for name in ("run", "quality"):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, trained)
    monkeypatch.setattr(precision, "errors", lambda *_: [{"kind": "error"}])
    monkeypatch.setattr(distance, "measure", lambda *_: [{"network": "n", "steps": 2, "residual_cosine": 1.0}])
    monkeypatch.setattr(command, "workers", threads)
    module.main(record.shlex.split(typed))
    (path,) = record.RECORDS.iterdir()
    run = record.read(path)
    name = module.__name__.replace(".studies", "")
    assert run["command"] == f"python -m {name} {typed}".strip() and "unfinished" not in run
    assert capsys.readouterr().out.endswith(f"recorded: {path}\n")  # a folder outside of the repository


@pytest.mark.parametrize("module", [sampling, sweeps, increments], ids=lambda module: module.__name__)
def test_an_interrupted_run_keeps_what_it_has_measured(module, tiny, monkeypatch):
    plain, calls = module.measure, []

    def measure(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(module, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        module.main(["--seconds", "0"])
    (path,) = record.RECORDS.iterdir()
    run = record.read(path)
    assert run["unfinished"] and len({row["case"] for row in run["rows"]}) == 1 and run["rows"][0]["seconds"]
    assert "Not everything passed or was reached" in pages.BLOCKS[run["benchmark"]].render(run)


@pytest.mark.slow
def test_sigterm_leaves_a_record(tmp_path):
    code = """
import os, signal
from benchmarks.harness import command
from benchmarks.studies import sweeps
plain, calls = sweeps.measure, []
def measure(*given):
    calls.append(given)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return plain(*given)
sweeps.measure = measure
config = sweeps.network("cpu", batch=4, hidden=16, depth=1, heads=2, side=4)
sweeps.sweep = lambda: sweeps.Sweep(config, (4, 8), (), ())
command.run(lambda: sweeps.main(["--seconds", "0"]))
"""
    found = shell("-c", code, SOFLOW_RECORDS=str(tmp_path))
    assert found.returncode == 143
    (path,) = tmp_path.iterdir()
    assert [row["value"] for row in json.loads(path.read_text())["rows"]] == [4, 4]


def test_a_way_of_sampling_that_runs_out_of_memory_says_so(tiny, monkeypatch, capsys):
    plain = sampling.contestants

    def falls() -> None:
        raise torch.OutOfMemoryError("none left")

    def contestants(case: Case, batch: int) -> dict[str, Callable[[], Callable[[], object]]]:
        later = iter([None] * (sampling.WARM + 1))
        return plain(case, batch) | {
            "never": lambda: falls,
            "later": lambda: lambda: next(later, 0) == 0 and falls(),
        }

    monkeypatch.setattr(sampling, "contestants", contestants)
    sampling.main(["--seconds", "0"])
    run = record.newest(benchmark="sampling")
    assert run is not None
    rows = {row["way"]: row for row in run["rows"] if row["batch"] == 3}
    assert len(rows["fp32"]["seconds"]) == len(rows["bf16"]["seconds"]) == 5
    assert [(rows[n]["why_not"], rows[n]["seconds"]) for n in ("never", "later")] == [
        ("out of memory", []),
        ("out of memory beside the others", []),
    ]
    assert "never: out of memory\n" in capsys.readouterr().out
    assert "|  | never |  | out of memory |  |" in quality.sampling(run)
    assert compare.compare(run, run).count("| 1.00x |") == 8


def test_a_check_that_runs_out_of_memory_is_a_row(tiny, monkeypatch):
    def check(config: Config) -> None:
        if config.model.input_size == 2:
            raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(sweeps, "check", check)
    sweeps.main(["--seconds", "0"])
    run = record.newest(benchmark="sweeps")
    assert run is not None
    assert [row["why_not"] for row in run["rows"]] == [None] * 4 + ["out of memory"] * 2


def test_a_training_that_fails_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(digits.sys, "executable", "false")
    with pytest.raises(UserError, match="--seeds 3: the training ended with exit code 1"):
        digits.run(3, tmp_path)


def test_workers_are_as_many_as_there_are_cores(monkeypatch):
    monkeypatch.setattr(command.os, "cpu_count", lambda: 3)
    parser = command.Parser(prog="command", description=None)
    command.add_workers(parser)
    assert parser.parse([]).workers == parser.parse(["--workers", "3"]).workers == 3
    with pytest.raises(UserError) as error:
        parser.parse(["--workers", "4"])
    assert str(error.value) == "argument --workers: must be at most 3, the cores of this machine, got 4"
    monkeypatch.setattr(command.os, "cpu_count", lambda: None)  # where it is not known
    assert parser.parse(["--workers", "1"]).workers == 1


def test_processes_end_with_the_command():
    with pytest.raises(KeyboardInterrupt), command.workers(2) as pool:
        running = [pool.submit(time.sleep, 600) for _ in range(4)]
        assert pool.submit is not None and not running[-1].done()
        while len(multiprocessing.active_children()) < 2:
            time.sleep(0.01)
        children = multiprocessing.active_children()
        raise KeyboardInterrupt
    for child in children:  # the pool's own thread may be the one that learns its exit code
        with pytest.raises(ProcessLookupError):
            for _ in range(6000):
                os.kill(child.pid, 0)
                time.sleep(0.01)
    with command.workers(1) as pool:
        assert pool.submit(abs, -3).result() == 3
