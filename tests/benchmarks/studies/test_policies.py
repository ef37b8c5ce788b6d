"""The study of policies, a few steps of each method; its page and plot."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

from benchmarks.baselines import behaviour_cloning
from benchmarks.harness import command
from benchmarks.report import figures, pages, record
from benchmarks.studies import policies
from soflow_fast.config.schema import PolicyConfig

pytest.importorskip("gymnasium")


@contextmanager
def threads(number: int):
    """In place of processes."""
    with ThreadPoolExecutor(1) as pool:
        yield pool


def test_the_record_its_table_and_its_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(policies, "EPISODES", 2)
    monkeypatch.setattr(policies, "TIMED", 20)
    monkeypatch.setattr(policies, "TASKS", ("obstacle",))
    monkeypatch.setattr(command, "workers", threads)
    monkeypatch.setattr(record, "RECORDS", tmp_path)
    before = torch.get_num_threads()
    try:
        policies.main(["--seeds", "0", "--steps", "2", "--workers", "1"])
    finally:
        torch.set_num_threads(before)
    (path,) = tmp_path.glob("*-policies-*.json")
    rows = record.read(path)["rows"]
    ways = [name for method in policies.METHODS.values() for name in method.ways]
    assert [row["method"] for row in rows] == ways
    for row in rows:
        assert row["share"] == pytest.approx((row["return"] - row["random"]) / (row["expert"] - row["random"]))
        assert min(row["ms_per_action"], row["ms_per_chunk"], row["seconds"]) > 0
    assert len({(row["expert"], row["random"]) for row in rows}) == 1  # all act in the same episodes
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "policies.md"
    page.write_text("<!-- benchmark:policies -->\n<!-- /benchmark:policies -->\n")
    pages.main([], tmp_path, tmp_path)
    assert (
        all(f"| obstacle | {way} |" in page.read_text() for way in ways)
        and "figures/policies-light.svg" in page.read_text()
    )
    script = record.ROOT / "docs" / "figures" / "policies.py"
    assert "<svg" in figures.drawn(script, figures.LIGHT, tmp_path)[:500]


def test_methods_differ_in_what_is_learned_alone():
    states = [policies.built("obstacle", method, 0, 10)[0] for method in policies.METHODS]
    for state in states[1:]:
        assert state.config.optim == states[0].config.optim and state.config.model == states[0].config.model
        for p, q in zip(state.flow.parameters(), states[0].flow.parameters(), strict=True):
            assert torch.equal(p, q)


def test_behaviour_cloning_is_the_plain_squared_error():
    state, source, _ = policies.built("obstacle", "behaviour cloning", 0, 10)
    x0, y = source.batch(0)
    before = behaviour_cloning.chunks(state)(y, torch.randn(len(x0), *x0.shape[2:]))
    loss = (before - x0[:, 0]).square().mean()
    metrics = behaviour_cloning.step(state, x0, y)
    torch.testing.assert_close(metrics["fm_loss"], loss)
    assert isinstance(state.config.model, PolicyConfig)
