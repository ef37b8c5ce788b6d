"""The options of `pytest benchmarks/`, and the record that a run leaves however it ends."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from benchmarks import conftest
from benchmarks.harness.race import Row
from benchmarks.report import record
from benchmarks.report.blocks import layout

KINDS = """
import time, pytest
@pytest.fixture(scope="module", autouse=True)
def around():
    yield
    print("torn down")
@pytest.fixture
def device():
    return "cpu"
@pytest.mark.parametrize("k", range(3))
def test_kernel(device, k):
    print("ran", __name__, k)
    time.sleep(WAIT)
def test_other():
    print("ran other")
"""


@pytest.mark.parametrize(("wait", "within", "ran"), [(0.0, 600.0, 6), (0.3, 0.2, 1)])
def test_a_share_of_time_for_tests(wait, within, ran, environment, tmp_path):
    """Those that take a fixture, the files in turn, none begun when time is up."""
    for name in ("a", "b"):
        (tmp_path / f"test_{name}.py").write_text(KINDS.replace("WAIT", str(wait)))
    options = ["-q", "-s", "-p", "no:cacheprovider", "-p", "benchmarks.harness.within", f"--within={within}"]
    command = [sys.executable, "-m", "pytest", *options, "--taking=device", "--rootdir", str(tmp_path), str(tmp_path)]
    found = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    lines = [line.lstrip(".") for line in found.stdout.splitlines()]
    assert found.returncode == 0, found.stdout + found.stderr
    order = [f"ran test_{name} {k}" for k in range(3) for name in "ab"]
    assert [line for line in lines if line.startswith("ran")] == order[:ran]
    assert ("time is up: 5 tests are left out" in found.stdout) == (ran == 1) and "torn down" in found.stdout


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"seconds": -1.0}, {"kernel_seconds": float("nan")}], ids=str)
def test_options_of_the_benchmarks(wrong, monkeypatch):
    monkeypatch.setattr(conftest.signal, "signal", lambda *_: None)
    options = {"batch": 32, "seconds": 1.0, "kernel_seconds": 1.0, "record": False}
    lines: list[tuple[str, str]] = []
    known = {"stash": {}, "addinivalue_line": lambda *line: lines.append(line)}
    conftest.pytest_configure(SimpleNamespace(option=SimpleNamespace(**options), **known))
    assert lines == [("filterwarnings", "ignore:Benchmark fixture was not used")]
    with pytest.raises(pytest.UsageError, match="--" + next(iter(wrong)).replace("_", "-")):
        conftest.pytest_configure(SimpleNamespace(option=SimpleNamespace(**options | wrong), stash={}))


def test_what_was_measured_is_on_record_however_the_run_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RECORDS", tmp_path)
    row = Row(case="c", recipe="r", seconds=[1.0]).as_dict()
    for code, said in ((0, ".json"), (1, "not everything passed or was reached"), (2, "passed or was reached")):
        lines: list[str] = []
        config = SimpleNamespace(
            stash={conftest.BEGUN: None},
            rootpath=tmp_path,
            getoption=lambda name: True,
            invocation_params=SimpleNamespace(args=["benchmarks/"]),
        )
        steps, kernels = (conftest.Rows(config, name) for name in ("step", "kernels"))
        config.stash |= {conftest.ROWS: steps, conftest.KERNEL_ROWS: kernels}
        steps.missing = ["test_step[a]", "test_step[b]"]
        steps.keep(row, row)
        run = record.newest(tmp_path)
        assert run is not None and run["unfinished"] and run["missing"] == steps.missing, "before the run ends"
        assert "Missing: test_step[a]; test_step[b]." in layout.measured(run, "")
        steps.missing.clear()
        conftest.pytest_terminal_summary(SimpleNamespace(line=lines.append, section=lines.append), code, config)
        assert lines[-1].startswith("recorded: ") and lines[-1].endswith(said)
        run = record.newest(tmp_path)
        assert run is not None and run["rows"] == [row, row] and "missing" not in run
        (tmp_path / run["file"]).unlink()
