"""The benchmark of scaling: every byte between ranks is seen, ranks that fail end it, what is recorded and shown."""

import json
import os
import signal
import time
from typing import Any

import pytest
import torch
import torch._dynamo  # which torch would import in each fork, for seconds
import torch.distributed as dist

from benchmarks.correctness.comparison import IncorrectResult
from benchmarks.harness.cases import Case
from benchmarks.harness.collectives import Collective, Counted
from benchmarks.report import record
from benchmarks.report.blocks import steps
from benchmarks.studies import scaling
from soflow_fast.config.schema import RunConfig, override
from soflow_fast.errors import ConfigError, UserError
from soflow_fast.launch import Launch
from soflow_fast.training.parallel import join
from soflow_fast.training.plan import Cluster, plan
from tests.benchmarks.tiny import CONFIG
from tests.forked import on_ranks

FP32 = override(CONFIG, {"precision": "fp32"})
EXCHANGED = range(0, 200)
"""Bytes of norm, flags and losses that each rank sends to another."""


def point(ranks: int, kind: str = "ddp", batches: dict[str, int] | None = None, **changes: object) -> scaling.Point:
    return scaling.Point(kind, ranks, override(FP32, changes), batches or {"weak": 4 * ranks}, 0)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that are there at once."""
    monkeypatch.setattr(scaling, "START", "fork")


def collectives(launch: Launch) -> list[Collective]:
    join(launch, RunConfig(device="cpu"), torch.device("cpu"))
    x, out = torch.ones(6), torch.empty(12)
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    with Counted() as counted:
        dist.all_reduce(x)
        gather(out, x)
        scatter(x, out)
        dist.all_gather([torch.empty(6), torch.empty(6)], x)
        dist.broadcast(x, 0)
        dist.barrier()
        with pytest.raises(AssertionError, match="c10d::alltoall_base_: its bytes are not known"):
            dist.all_to_all_single(torch.empty(6), x)
    return counted.found


def test_the_bytes_of_collectives() -> None:
    for found in on_ranks(2, collectives):
        assert [(c.name, c.size, c.sent) for c in found] == [
            ("allreduce_", 24, 24),
            ("_allgather_base_", 48, 24),
            ("_reduce_scatter_base_", 48, 24),
            ("allgather_", 48, 24),
            ("broadcast_", 24, 12),
        ]
        assert {c.ranks for c in found} == {2}
    assert Collective("allreduce_", 24, 4).sent == 36 and Collective("_allgather_base_", 24, 4).sent == 18


def rows_of(launch: Launch, given: scaling.Point) -> list[dict]:
    return scaling.measure(given, launch)


@pytest.mark.parametrize(
    ("kind", "changes", "ranks"),
    [
        ("ddp", {}, 2),
        ("fsdp", {}, 2),
        ("ddp", {"precision": "bf16", "run.reduce_dtype": "bf16"}, 2),
        ("fsdp", {"precision": "bf16"}, 2),
        ("fsdp", {"objective.guidance_scale": 1.0}, 2),
        pytest.param("fsdp", {}, 3, marks=pytest.mark.slow),  # rows that 3 does not divide
        pytest.param("ddp", {}, 4, marks=pytest.mark.slow),
    ],
)
def test_what_is_counted_is_what_the_formula_says(kind: str, changes: dict[str, object], ranks: int) -> None:
    ranks_rows = on_ranks(ranks, rows_of, point(ranks, kind, **changes))
    for (row,) in ranks_rows:
        assert row["sent"] - row["formula"] in [(ranks - 1) * n for n in EXCHANGED] and row["formula"] > 10_000
        assert (
            row["way"] == f"{kind}, {ranks} ranks" and len(row["seconds"]) == scaling.LEAST and min(row["seconds"]) > 0
        )
        assert row["collectives"].keys() - {"_allgather_base_"} == {
            "allreduce_" if kind == "ddp" else "_reduce_scatter_base_"
        }
    assert len({json.dumps(row["figures"]) for (row,) in ranks_rows}) == 1


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_what_is_counted_is_what_a_plan_predicts(kind: str) -> None:
    """`--dry-run --gpus 2`, to the byte and to the call."""
    given = point(2, kind, precision="bf16")
    ((row,), _) = on_ranks(2, rows_of, given)
    of_run = {"run.parallel": kind, "batch_size": given.batches["weak"], "run.recompute": "none"}
    traffic = plan(override(given.config, of_run), Cluster("h100", 2)).step.whole.traffic
    assert (traffic.nvlink, traffic.calls) == (row["sent"], sum(row["collectives"].values()))


def test_the_command(
    forked: None, committed: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(record, "RECORDS", tmp_path)
    case = Case("tiny", override(FP32, {"batch_size": 4}))
    monkeypatch.setattr(scaling, "study", lambda: scaling.Study(case, 12))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    scaling.main(["--ranks", "2", "--seconds", "0"])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("processes on a CPU: efficiency is that of this machine's cores")
    assert len(said) == 8 and said[3].startswith("weak: ddp, 2 ranks, batch 8: ") and ", efficiency " in said[3]
    run = record.newest(tmp_path, "scaling")
    assert run is not None and "unfinished" not in run and run["command"].endswith("--ranks 2 --seconds 0")
    found = [(row["kind"], row["way"], row["ranks"], row["batch"]) for row in run["rows"]]
    assert found == [
        ("weak", "one process", 1, 4),
        ("strong", "one process", 1, 12),
        ("weak", "ddp, 2 ranks", 2, 8),
        ("strong", "ddp, 2 ranks", 2, 12),
        ("weak", "fsdp, 2 ranks", 2, 8),
        ("strong", "fsdp, 2 ranks", 2, 12),
    ]
    assert [row["sent"] == row["formula"] == 0 for row in run["rows"]] == [True, True, False, False, False, False]
    text = steps.scaling(run)
    alone, two = run["rows"][1], run["rows"][3]
    ratio = (two["batch"] / sorted(two["seconds"])[1]) / (2 * alone["batch"] / sorted(alone["seconds"])[1])
    (line,) = [line for line in text.splitlines() if line.startswith("| strong: ddp, 2 ranks | 12 | ")]
    assert f" | {ratio:.2f} | " in line and "efficiency is that of its cores" in text
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {8}
    run["rows"][3] |= {"seconds": [], "why_not": "out of memory"}
    assert "| strong: ddp, 2 ranks | 12 | out of memory | out of memory |" in steps.scaling(run)


def test_another_first_step_is_not_timed(forked: None) -> None:
    alone = scaling.on_ranks(scaling.measure, point(1, batches={"strong": 8}))[0][0]
    two = scaling.on_ranks(scaling.measure, point(2, "fsdp", {"strong": 8}))[0][0]
    scaling.check(two, alone)
    for name in ("fm_mse", "sc_mse", "grad_norm"):
        for wrong in (1.001 * alone["figures"][name], float("nan")):
            with pytest.raises(IncorrectResult, match=rf"fsdp, 2 ranks: {name} of the first step is "):
                scaling.check(two | {"figures": alone["figures"] | {name: wrong}}, alone)


def refusing(given: scaling.Point, launch: Launch) -> list[dict]:
    if launch.rank == 1:
        raise ConfigError("--parallel: is refused")
    time.sleep(600)
    return []


def failing(given: scaling.Point, launch: Launch) -> list[dict]:
    return [{"why_not": 1 / 0}] if launch.rank == 1 else refusing(given, launch)


def killed(given: scaling.Point, launch: Launch) -> list[dict]:
    if launch.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return refusing(given, launch)


def out_of_memory(given: scaling.Point, launch: Launch) -> list[dict]:
    return [{"why_not": "out of memory"}] if launch.rank == 1 else refusing(given, launch)


def test_one_rank_that_fails_ends_all(forked: None) -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match=r"^--parallel: is refused$"):
        scaling.on_ranks(refusing, point(2))
    with pytest.raises(RuntimeError, match=r"(?s)^rank 1:.*ZeroDivisionError"):
        scaling.on_ranks(failing, point(2))
    with pytest.raises(RuntimeError, match=r"^rank 1 ended with -9$"):
        scaling.on_ranks(killed, point(2))
    assert scaling.on_ranks(out_of_memory, point(2)) == [[{"why_not": "out of memory"}]]
    assert time.monotonic() - began < 60


def test_memory_that_runs_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(*_: object) -> dict:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(scaling, "timed", timed)
    (row,) = scaling.measure(point(1, scaling.ALONE, {"weak": 4, "strong": 8}), None)
    assert row["why_not"] == "out of memory" and scaling.gathered([[row]]) == [row]
    assert scaling.said(row, row) == "weak: one process, batch 4: out of memory"


@pytest.mark.slow
def test_ranks_of_fresh_processes() -> None:
    found = scaling.on_ranks(scaling.measure, point(2, "ddp"))
    assert [rows[0]["sent"] == found[0][0]["sent"] > 0 for rows in found] == [True, True]
