"""The studies of precision and increments, a few steps of each."""

import pytest
import torch

from benchmarks.report import record
from benchmarks.report.blocks import numerics
from benchmarks.studies import increments, precision
from tests.benchmarks.tiny import CASE


@pytest.fixture
def threads():
    """The studies set the number of threads of their process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_what_increments_cost(tmp_path):
    rows = increments.measure(CASE, 0.0)
    assert [row["way"] for row in rows] == [*increments.WAYS, "forward", "paired forward"]
    assert len({len(row["seconds"]) for row in rows}) == 1
    record.write(rows, "python -m benchmarks.increments", tmp_path, "increments")
    text = numerics.increments(record.newest(tmp_path, "increments"))
    assert text.count("x |") == 3 and "| forward |" in text


def test_precision_recipes_train_and_are_judged(threads, monkeypatch):
    """Every recipe for a few steps: the step that it asks for is the step that it gets."""
    monkeypatch.setattr(precision, "SAMPLES", 40)
    for name in ("bf16, increments", "float32, literal EMA 0.99", "bf16, fp16 pair"):
        row = precision.quality(name, 0.002, 0, 3)
        assert row["recipe"] == name and set(row["nfe"]) == {1, 2} and row["last"]["sc_mse"] > 0
    state, _ = precision.train(precision.configuration(0, 0.002, 1), precision.WAYS["fp16 pair"])
    assert state.target == precision.WAYS["fp16 pair"]


def test_the_ways_of_increments_are_three(monkeypatch):
    seen = []
    monkeypatch.setattr(increments, "train_step", lambda state, x, y: seen.append(state.target))
    steps = increments.contestants(CASE)
    for name in increments.WAYS:
        steps[name]()
    assert seen == list(increments.WAYS.values()) and len({type(how) for how in seen}) == 2


def test_errors_are_of_each_way(threads):
    rows = precision.errors(seed=0, steps=3, samples=16)
    found = {row["way"]: row["error"] for row in rows if row["r"] == 0.002}
    assert found["float32 increments"] < found["float32 pair"] < found["bf16 pair"]
    assert found["bf16 increments"] < found["bf16 pair"]
