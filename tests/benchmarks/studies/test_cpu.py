"""The bf16 step of a CPU beside the authors' float32 recipe: what is run, and that it is refused elsewhere."""

import pytest
import torch

from benchmarks.harness.cases import Case
from benchmarks.report.blocks.steps import cpu
from benchmarks.studies import cpu as study
from soflow_fast.errors import UserError
from tests.benchmarks.tiny import CONFIG


def test_every_way_is_timed_in_its_precision(monkeypatch):
    built = []
    real = study.build
    monkeypatch.setattr(study, "build", lambda recipe, config: built.append(real(recipe, config)) or built[-1])
    rows = study.measure(Case("tiny", CONFIG), 1.0)
    assert [row["way"] for row in rows] == list(study.WAYS) and all(len(row["seconds"]) >= 1 for row in rows)
    assert [state.precision for state in built] == ["fp32", "fp32", "bf16"]
    assert built[2].target.kind == "increments"


def test_the_page_says_how_many_times_as_fast():
    rows = [{"case": "a net", "way": way, "batch": 2, "seconds": [s] * 7} for way, s in (("one", 0.3), ("other", 0.1))]
    run = {"rows": rows, "versions": {}, "threads": 2, "commit": "", "date": "2026-01-01", "device": "a CPU"}
    text = cpu({**run, "file": "x.json", "command": "python -m benchmarks.cpu"})
    assert "| other | 100.0 (100.0 to 100.0) | 3.00x |" in text


def test_elsewhere_it_is_refused(monkeypatch):
    monkeypatch.setattr(study, "has_products", lambda: False)
    with pytest.raises(UserError, match="is for a CPU with bf16 products"):
        study.main([])
    monkeypatch.setattr(study, "has_products", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="is for a CPU with bf16 products"):
        study.main([])
