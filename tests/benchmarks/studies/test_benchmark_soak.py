"""The record of the whole tests of reliability."""

import sys

import pytest

from benchmarks.report import record
from benchmarks.report.blocks import runs
from benchmarks.studies import soak

TESTS = """
import os
import pytest

def test_good(record_property):
    assert os.environ["SOFLOW_SOAK"] == "1"
    record_property("MB per 1000 steps", 0.25)

def test_bad():
    assert False

@pytest.mark.skip
def test_absent():
    pass
"""


@pytest.mark.slow
def test_files_are_counted_and_what_they_measured_is_kept(tmp_path, capsys):
    (tmp_path / "test_one.py").write_text(TESTS)
    (tmp_path / "test_two.py").write_text("def test_good():\n    pass\n")
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", str(tmp_path)]
    assert soak.main([], command, tmp_path) == 1
    run = record.newest(tmp_path, "soak")
    assert run is not None and "recorded: " in capsys.readouterr().out
    rows = {row["file"]: {name: value for name, value in row.items() if name != "duration"} for row in run["rows"]}
    assert rows == {
        "test_one": {
            "file": "test_one",
            "passed": 1,
            "failed": 1,
            "skipped": 1,
            "measured": {"MB per 1000 steps": 0.25},
        },
        "test_two": {"file": "test_two", "passed": 1, "failed": 0, "skipped": 0, "measured": {}},
    }


REPORT = """
import pathlib, sys
path = next(word for word in sys.argv if word.startswith("--junitxml=")).partition("=")[2]
pathlib.Path(path).write_text('<testsuites><testcase classname="tests.test_one" time="0.5"/></testsuites>')
"""


def test_a_run_that_passes_ends_with_0(tmp_path):
    assert soak.main([], [sys.executable, "-c", REPORT], tmp_path) == 0
    run = record.newest(tmp_path, "soak")
    assert run is not None and [row["passed"] for row in run["rows"]] == [1]


def test_pytest_that_does_not_run_leaves_no_record(tmp_path, capsys):
    assert soak.main([], [sys.executable, "-c", "raise SystemExit(3)"], tmp_path) == 2
    assert "pytest left no report (exit code 3)" in capsys.readouterr().err
    assert record.newest(tmp_path, "soak") is None


def test_the_page_says_how_it_ended():
    row = {"passed": 3, "failed": 0, "skipped": 1, "duration": 90.0, "measured": {}}
    rows = [row | {"file": "test_soak", "measured": {"steps": 800, "MB per 1000 steps": 0.25}}, row | {"file": "b"}]
    run = {
        "rows": rows,
        "command": "c",
        "versions": {},
        "threads": 1,
        "commit": None,
        "date": "2026-11-21",
        "device": "d",
    }
    text = runs.soak(run | {"file": "f"})
    assert "6 passed, 0 failed, 2 skipped, 3.0 minutes. `c`." in text
    assert "Over 800 steps resident memory rose by 0.25 MB per 1000." in text
    text = runs.soak(run | {"file": "f", "rows": [row | {"file": "b", "failed": 2}]})
    assert "3 passed, 2 failed (`b`), 1 skipped" in text and "memory" not in text
