"""`--dry-run --gpus`: a step on many GPUs, predicted and said to be."""

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from soflow_fast.commands.many_gpus import FIRST_LINE, said_of
from soflow_fast.config.gpus import GPUS
from soflow_fast.config.presets import preset
from soflow_fast.config.schema import Config, override
from soflow_fast.training.plan import Cluster, plan

Call = Callable[..., Any]
ROWS = ["on", "preset", "parameters", "each GPU", "memory", "links", "step", "speed", "time needed"]


def configured(**changes: Any) -> Config:
    small = {"model.hidden_size": 32, "model.depth": 2, "model.num_heads": 2, "batch_size": 64, "device": "cpu"}
    return override(preset("digits"), {**small, **changes})


def test_the_prediction_is_printed_and_nothing_is_written(call: Call, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--set=model.hidden_size=32", "--set=model.num_heads=2", "--parallel", "hsdp", "--gpu", "a100"]
    result = call("train", "--dry-run", "--gpus", "4", "--nodes", "2", *small)
    assert (result.code, result.err) == (0, "")
    first, *lines = result.out.splitlines()
    assert first == FIRST_LINE and "redicted" in first and "nothing of this was measured" in first
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in lines[: len(ROWS)])
    assert list(rows) == ROWS
    assert rows["on"] == "8 x A100 SXM, 80 GB: 2 nodes of 4; hsdp, the state cut over 4, 2 times"
    assert rows["preset"].endswith("DiT of hidden size 32, depth 4, 4 tokens; bf16")
    assert rows["each GPU"] == "8 of 64 images a step; recompute nothing"
    assert re.fullmatch(r"\d\.\d\d GB at its peak, fits the 77.3 GB that are usable: weights .*", rows["memory"])
    assert re.fullmatch(r"each GPU sends [\d.]+ MB by NVLink and [\d.]+ MB by the network in a step", rows["links"])
    assert re.search(r"images/s, [\d.]+% of 8 GPUs that each compute their 8 alone$", rows["speed"])
    table = [line.split() for line in lines[len(ROWS) + 2 : len(ROWS) + 8]]
    assert [line[0] for line in table] == ["guidance", "student", "target", "backward", "update", "step"]
    for column in range(1, 6):  # parts add up, but for what is rounded in each
        *parts, whole = (float(line[column]) for line in table)
        assert sum(parts) == pytest.approx(whole, abs=0.03)
    assert "230 GB/s to others of its node and 22 GB/s to other nodes" in result.out
    assert os.listdir(tmp_path) == []


def test_a_public_size_takes_seconds_and_no_data(call: Call, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    result = call("train", "imagenet256-b4", "--dry-run", "--gpus", "8")
    assert (result.code, result.err) == (0, "")
    assert "on            8 x H100 SXM, 80 GB: one node; ddp\n" in result.out and "131.17 M" in result.out


@pytest.mark.slow
def test_micro_batches_are_found_for_the_gpu(monkeypatch: Any) -> None:
    """One that has room for less takes smaller ones, and one that has room for all keeps more for the backward."""
    config = configured(micro_batch="auto", precision="bf16", batch_size=512, parallel="fsdp", steps=7)
    whole = plan(config, Cluster("h100", 2))
    assert whole.micro_batches == 1 and whole.config.run.recompute == "nothing" and whole.fits
    small = dataclasses.replace(GPUS["h100"], memory=int(0.6 * whole.memory.peak / 0.9))
    monkeypatch.setitem(GPUS, "h100", small)
    cut = plan(config, Cluster("h100", 2))
    assert cut.micro_batches > 1 and cut.fits and cut.memory.peak > 0.4 * whole.memory.peak
    assert cut.step.whole.traffic.nvlink > (cut.micro_batches - 0.1) * whole.step.whole.traffic.nvlink
    assert f"in {cut.micro_batches} micro-batches; recompute {cut.config.run.recompute}" in said_of(cut)
    monkeypatch.setitem(GPUS, "h100", dataclasses.replace(small, memory=cut.memory.state))
    assert "GB at its peak, does not fit the 0.0" in said_of(cut)


def test_more_nodes_send_more_and_are_no_faster_than_their_sum() -> None:
    """The share of a GPU stays; so does what it computes, and what each sends grows towards a limit."""
    base = configured(parallel="fsdp", recompute="none")
    found = {n: plan(override(base, {"batch_size": 64 * n}), Cluster("h100", 8, n)) for n in (1, 3)}
    sent = [p.step.whole.traffic.nvlink + p.step.whole.traffic.network for p in found.values()]
    assert sent == sorted(sent) and [p.step.whole.traffic.network > 0 for p in found.values()] == [False, True]
    assert {p.share for p in found.values()} == {8}
    states = [p.memory.state for p in found.values()]
    assert states == sorted(states, reverse=True)
    for p in found.values():
        assert p.step.seconds >= p.step.whole.seconds >= p.step.whole.compute > 0
        assert p.images_per_second == pytest.approx(p.efficiency * p.cluster.ranks * p.share / p.alone.seconds)


def test_a_step_of_replicas_may_be_a_cuda_graph() -> None:
    config = configured(precision="bf16", recompute="none")
    eager, graph = (plan(override(config, {"cuda_graph": value}), Cluster("h100", 2)) for value in ("auto", "true"))
    assert not eager.step.graph and eager.step.seconds == eager.step.host > graph.step.seconds
    assert graph.step.graph and graph.alone.graph and eager.alone.graph
    assert "host none, as a CUDA graph" in said_of(graph)
