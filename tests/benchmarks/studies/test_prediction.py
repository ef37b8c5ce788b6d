"""Predicted steps of several recipes: what shallow networks say of deep ones, and what is assumed of compiled code."""

import pytest

from benchmarks.report import record
from benchmarks.report.blocks import predictions as blocks
from benchmarks.studies import prediction
from benchmarks.studies.prediction import COMPILED_PASSES, WAYS, Way, compiled_bytes, predictions
from soflow_fast.config.presets import preset
from soflow_fast.training.time_estimate import estimate_time

BATCH = 8


def named(part: str) -> list[Way]:
    found = [way for way in WAYS if part in way.name]
    assert found
    return found


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict]:
    """Every recipe on a small network, a compiled one too."""
    monkeypatch.setattr(prediction, "LEAST_COMPILED", 0)
    return {row["recipe"]: row for row in predictions("digits", BATCH)}


def test_ours_is_as_the_engine_predicts_it(rows: dict[str, dict]) -> None:
    """The digits' network has four blocks, and two and three of them are counted."""
    whole = estimate_time(preset("digits"), "h100", batch=BATCH)
    ours, graph = rows["soflow-fast"], rows["soflow-fast, CUDA graph"]
    assert ours["bytes"] == whole.total.bytes and ours["flops"] == whole.total.flops
    assert ours["launches"] == pytest.approx(whole.total.launches, abs=4)
    assert graph["predicted_ms"]["h100"] == pytest.approx(1e3 * whole.graph, rel=0.01)
    assert ours["predicted_ms"]["h100"] == pytest.approx(1e3 * whole.eager, rel=0.01)
    assert ours["predicted_ms"]["h100"] > graph["predicted_ms"]["h100"]


def test_every_recipe_is_there_and_nothing_is_called_measured(rows: dict[str, dict]) -> None:
    assert list(rows) == [way.name for way in WAYS]
    for name, row in rows.items():
        assert set(row["predicted_ms"]) == {"h100", "h200"} | ({"a100"} if "quack" not in name else set())
        assert min(row["predicted_ms"].values()) > 0
        assert "seconds" not in row
    # The authors' recipe makes the same products, in six calls.
    assert rows["authors' recipe in TF32"]["flops"] == pytest.approx(rows["soflow-fast"]["flops"], rel=0.03)
    assert rows["MeanFlow as published, in bf16, fused update"]["flops"] > 1.2 * rows["soflow-fast"]["flops"]


def test_packages_save_the_passes_that_they_are_for(rows: dict[str, dict]) -> None:
    """Of the digits' network: 4 blocks, of 4 tokens, 128 wide, half of the batch in the consistency loss."""
    plain, packed = rows["soflow-fast"], rows["soflow-fast, with quack-kernels and flash-attn"]
    assert packed["flops"] == plain["flops"]
    tokens, inner, qkv = 4 * BATCH * 4 * 2, 4 * 128, 3 * 128
    # The GELU's read and write in the forward; in the backward its two reads and two writes, but for the bias's sum;
    # the three gradients that are read and written once more.
    saved = tokens * (inner * (2 + 4 - 1) + qkv)
    assert saved < plain["other_bytes"] - packed["other_bytes"] < 1.05 * saved  # and the parts of sums over rows


def test_compiled_blocks_move_what_is_assumed(rows: dict[str, dict], monkeypatch: pytest.MonkeyPatch) -> None:
    (way,) = named("compiled by assumption")
    config = preset("digits", batch_size=BATCH)
    activation = BATCH * 4 * 128 * 2
    assert compiled_bytes(config) == 4 * activation * (20 * (2 * 0.5 + 4 * 0.5) + 48)
    before = rows[way.name]
    monkeypatch.setattr(prediction, "COMPILED_PASSES", tuple(2 * n for n in COMPILED_PASSES))
    (after,) = predictions("digits", BATCH, [way])
    assert after["other_bytes"] - before["other_bytes"] == compiled_bytes(config) / 2
    assert after["bytes"] - before["bytes"] == compiled_bytes(config) / 2
    assert before["launches"] is None and before["flops"] == rows["authors' recipe in bf16, fused update"]["flops"]


def test_small_batches_have_no_compiled_row() -> None:
    assert predictions("digits", BATCH, named("compiled by assumption")) == []


def test_the_table_says_that_it_is_arithmetic(monkeypatch: pytest.MonkeyPatch, tmp_path, committed) -> None:
    monkeypatch.setattr(record, "RECORDS", tmp_path)
    monkeypatch.setattr(prediction, "CASES", [("digits", BATCH)])
    monkeypatch.setattr(prediction, "WAYS", named("soflow-fast"))
    prediction.main([])
    run = record.newest(benchmark="prediction")
    assert run is not None and run["command"] == "python -m benchmarks.prediction" and "unfinished" not in run
    text = blocks.prediction(run)
    assert "Arithmetic, not a measurement" in text
    assert "| digits, batch 8 | soflow-fast |" in text and "|  | soflow-fast, CUDA graph |" in text
