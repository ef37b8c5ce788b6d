"""MeanFlow's derivative by every way, on a tiny network: the figures of a record are right."""

import pytest
import torch

from benchmarks.harness.cases import Case
from benchmarks.report import pages, record
from benchmarks.studies import derivative
from soflow_fast.config.schema import override
from tests.benchmarks import tiny

CASE = Case("tiny", override(tiny.CONFIG, {"model.input_size": 8, "optim.lr": 1e-2, "batch_size": 16}))
BOUNDS = {"fp32": {"pair of forwards": 2e-2, "increments": 5e-3}, "bf16": {"increments": 3e-2}}


@pytest.fixture(scope="module")
def rows():
    return derivative.measure(CASE, 0.01, 20)


def test_each_way_is_right(rows):
    """The baselines' in float32 to its rounding, the engine's within what is stated of them."""
    assert [(row["precision"], row["way"]) for row in rows] == [
        (p, w) for p, ways in derivative.WAYS.items() for w in ways
    ]
    for row in rows:
        usual = 1e-5 if row["precision"] == "fp32" else 5e-2
        assert 0 < row["error"] < BOUNDS[row["precision"]].get(row["way"], usual), row
        assert len(row["seconds"]) >= 5 and row["batch"] == 4


def test_a_wrong_way_is_seen(monkeypatch):
    half = {"fp32": {"half": lambda place: derivative.by_jvp(place) / 2}}
    monkeypatch.setattr(derivative, "WAYS", half)
    assert derivative.measure(CASE, 0.01, 20)[0]["error"] == pytest.approx(0.5, abs=1e-3)


def test_the_record_makes_its_table(rows, tmp_path):
    record.write(rows, "python -m benchmarks.derivative", tmp_path, "derivative")
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "precision.md"
    page.write_text("<!-- benchmark:derivative -->\n<!-- /benchmark:derivative -->\n")
    assert pages.main([], tmp_path, tmp_path) == 0
    text = page.read_text()
    assert text.count("| increments |") == 2 and text.count("tiny: hidden") == 1 and "After 20 steps" in text
    assert torch.tensor([row["error"] for row in rows]).isfinite().all()
