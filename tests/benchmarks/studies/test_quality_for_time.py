"""SoFlow and MeanFlow by the seconds, a few steps of each."""

import dataclasses

import torch

from benchmarks.report import figures, pages, record
from benchmarks.studies import quality_for_time


def test_quality_for_time(tmp_path, monkeypatch):
    monkeypatch.setattr(quality_for_time, "SAMPLES", 40)
    threads = torch.get_num_threads()
    try:
        rows = [quality_for_time.run(method, 0, 5, 2) for method in quality_for_time.METHODS]
    finally:
        torch.set_num_threads(threads)
    for row in rows:
        assert [point["step"] for point in row["points"]] == [2, 4, 5]
        assert row["points"][0]["seconds"] < row["points"][-1]["seconds"]
    assert {row["method"]: row["nfe"] for row in rows if row["nfe"] > 1} == {"flow matching, 10 Euler steps": 10}
    record.write(rows, "python -m benchmarks.quality_for_time", tmp_path, "quality-for-time")
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "performance.md"
    page.write_text("<!-- benchmark:quality-for-time -->\n<!-- /benchmark:quality-for-time -->\n")
    pages.main([], tmp_path, tmp_path)
    text = page.read_text()
    assert all(f"| {method} |" in text for method in quality_for_time.METHODS) and "figures/quality-light.svg" in text
    assert "one-step samples (of flow matching 10 calls) of the averaged weights" in text
    script = record.ROOT / "docs" / "figures" / "quality.py"
    assert "<svg" in figures.drawn(script, figures.LIGHT, tmp_path)[:500]


def test_quality_compares_like_with_like():
    """The same initial weights, batches and settings; only the step differs, or what decides about it."""
    config = quality_for_time.configuration(0, 10)
    states = [recipe.build(config) for recipe in quality_for_time.METHODS.values()]
    for state in states[1:]:
        objective = dataclasses.replace(state.config.objective, kind="soflow", fm_fraction=0.5)
        assert state.config.optim == states[0].config.optim and objective == states[0].config.objective
        for p, q in zip(state.flow.parameters(), states[0].flow.parameters(), strict=True):
            assert torch.equal(p, q)
