"""`python -m benchmarks.soak` runs the tests of reliability, whole, and keeps what they found as a record.

Minutes of kills, signals, flipped bits and steps on a CPU. Exits 1 if a test failed, which the record says too.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.harness.command import Parser
from benchmarks.report import record

COMMAND = [sys.executable, "-m", "pytest", "tests/reliability", "-q", "-p", "no:cacheprovider"]


def rows(report: Path) -> list[dict]:
    """A row per file of tests, from pytest's JUnit report: how many passed, failed and were skipped, their duration in
    seconds, and what they measured (their `record_property`)."""
    found: dict[str, dict] = {}
    for case in ElementTree.parse(report).iter("testcase"):  # our own pytest's
        name = case.get("classname", "").rpartition(".")[2]
        row = found.setdefault(
            name, {"file": name, "passed": 0, "failed": 0, "skipped": 0, "duration": 0.0} | {"measured": {}}
        )
        states = {child.tag for child in case}
        state = "failed" if states & {"failure", "error"} else "skipped" if "skipped" in states else "passed"
        row[state] += 1
        row["duration"] += float(case.get("time", 0))
        row["measured"] |= {p.get("name"): float(p.get("value", "nan")) for p in case.iter("property")}
    return list(found.values())


def main(argv: Sequence[str] | None = None, tests: Sequence[str] = COMMAND, folder: Path | None = None) -> int:
    """The command; returns its exit code. tests: what runs them, pytest with what it is told."""
    Parser(prog="python -m benchmarks.soak", description=__doc__).parse(argv)
    begun = record.begin(folder)
    paths = os.pathsep.join([str(record.ROOT), str(record.ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as place:
        report = Path(place) / "junit.xml"
        environment = os.environ | {"SOFLOW_SOAK": "1", "PYTHONPATH": paths.rstrip(os.pathsep)}
        told = [f"--junitxml={report}", "-o", "junit_family=xunit1"]  # the one that has what tests measured
        code = subprocess.run([*tests, *told], cwd=record.ROOT, env=environment).returncode
        if not report.exists():
            print(f"benchmarks.soak: pytest left no report (exit code {code})", file=sys.stderr)
            return 2
        path = record.write(rows(report), "python -m benchmarks.soak", folder, "soak", begun=begun)
    print(f"recorded: {record.shown(path)}")
    return 1 if code else 0
