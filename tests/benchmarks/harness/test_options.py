"""The options of `pytest benchmarks/`, and the record that a run leaves however it ends."""

from types import SimpleNamespace

import pytest

from benchmarks import conftest
from benchmarks.harness.race import Row
from benchmarks.report import pages, record


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"seconds": -1.0}, {"kernel_seconds": float("nan")}], ids=str)
def test_options_of_the_benchmarks(wrong, monkeypatch):
    monkeypatch.setattr(conftest.signal, "signal", lambda *_: None)
    options = {"batch": 32, "seconds": 1.0, "kernel_seconds": 1.0, "record": False}
    conftest.pytest_configure(SimpleNamespace(option=SimpleNamespace(**options), stash={}))
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
        assert "Missing: test_step[a]; test_step[b]." in pages.measured(run, "")
        steps.missing.clear()
        conftest.pytest_terminal_summary(SimpleNamespace(line=lines.append, section=lines.append), code, config)
        assert lines[-1].startswith("recorded: ") and lines[-1].endswith(said)
        run = record.newest(tmp_path)
        assert run is not None and run["rows"] == [row, row] and "missing" not in run
        (tmp_path / run["file"]).unlink()
