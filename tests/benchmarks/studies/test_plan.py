"""Predicted steps on many GPUs: what a record keeps, the table, and that the record is that of the code."""

import dataclasses

import pytest

from benchmarks.report import record
from benchmarks.report.blocks import predictions
from benchmarks.studies import plan
from benchmarks.studies.plan import Point, configuration, points, predicted
from soflow_fast.config.gpus import GPUS
from soflow_fast.models.dit import DiT
from soflow_fast.training.state import build_flow

SMALL = {"model.hidden_size": 32, "model.depth": 2, "model.num_heads": 2, "model.input_size": 8}


def test_the_points_are_both_networks_on_8_to_512_gpus() -> None:
    found = list(points())
    assert len(set(found)) == len(found)
    for network in ("XL/2", "3 B"):
        of_it = {(p.gpus, p.kind) for p in found if p.network == network and "a GPU" in p.case}
        assert of_it == {(n, kind) for n in (8, 16, 32, 64, 128, 256, 512) for kind in ("ddp", "fsdp", "hsdp")} - {
            (8, "hsdp")
        }
    assert all(p.batch == 32 * p.gpus or p.batch == 2048 for p in found)


def test_the_large_network_has_3_billion_parameters() -> None:
    network = build_flow(configuration(Point("3 B", "", "fsdp", 8, 256))).network
    assert isinstance(network, DiT)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(3.08e9, rel=0.002)


def test_the_table_says_that_it_is_arithmetic(monkeypatch: pytest.MonkeyPatch, tmp_path, committed) -> None:
    monkeypatch.setattr(record, "RECORDS", tmp_path)
    monkeypatch.setattr(plan, "NETWORKS", {"small": SMALL})
    two = [Point("small", "small, batch 256", "fsdp", n, 256) for n in (8, 16)]
    monkeypatch.setattr(plan, "points", lambda: iter(two))
    plan.main([])
    run = record.newest(benchmark="plan")
    assert run is not None and run["command"] == "python -m benchmarks.plan" and "unfinished" not in run
    first, second = run["rows"]
    assert first["network_bytes"] == 0 < second["network_bytes"] and first["memory"]["peak"] > second["memory"]["peak"]
    assert sum(size for name, size in first["memory"].items() if name != "peak") == first["memory"]["peak"]
    assert first["step_ms"] == pytest.approx(max(first["gpu_ms"] + first["links_ms"], first["host_ms"]), abs=0.01)
    text = predictions.plan(run)
    assert "Arithmetic, not a measurement" in text
    assert "| small, batch 256 | 8 | fsdp | 1, nothing |" in text and "|  | 16 | fsdp | 1, nothing |" in text


def test_what_does_not_fit_has_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    point = Point("small", "small, batch 256", "ddp", 8, 256)
    monkeypatch.setattr(plan, "NETWORKS", {"small": SMALL})
    monkeypatch.setitem(GPUS, plan.GPU, dataclasses.replace(GPUS[plan.GPU], memory=10**5))
    assert predicted(point) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "kind", "gpus"),
    [
        ("XL/2, 32 images a GPU", "fsdp", 16),
        ("XL/2, 32 images a GPU", "ddp", 512),
        ("3 B, 32 images a GPU", "hsdp", 64),
        ("XL/2, batch 2048", "fsdp", 512),
    ],
)
def test_the_record_is_that_of_the_code(case: str, kind: str, gpus: int) -> None:
    """Where it is not, `python -m benchmarks.plan` and then `python -m benchmarks.report` bring the page up to date."""
    run = record.newest(record.HOME, "plan")
    assert run is not None
    (kept,) = (r for r in run["rows"] if (r["case"], r["parallel"], r["gpus"]) == (case, kind, gpus))
    (point,) = (p for p in points() if (p.case, p.kind, p.gpus) == (case, kind, gpus))
    assert predicted(point) == kept
