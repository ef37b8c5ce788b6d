"""The predicted time of a step: its operations, their prices, and what is said about them."""

import dataclasses
import re
from typing import Any

import pytest
import torch

from soflow_fast import preset
from soflow_fast.config.gpus import GPUS, Gpu, Host
from soflow_fast.config.schema import Config, DiTConfig, override
from soflow_fast.errors import ConfigError
from soflow_fast.models.attention import flop_counter
from soflow_fast.training.operation_count import Operation
from soflow_fast.training.state import TrainState
from soflow_fast.training.step import train_step
from soflow_fast.training.time_estimate import (
    PHASES,
    count_step,
    estimate_time,
    host_seconds,
    phase_time,
    seconds,
    table,
)

TINY = DiTConfig(input_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=2, num_heads=2, num_classes=10)
GPU = Gpu(
    "card",
    0,
    copy=1e12,
    products={"bf16": 4e12, "fp32": 1e12},
    attention=2e12,
    attention_backward=1e12,
    nvlink=1e11,
    network=1e10,
)


def tiny(**changes: Any) -> Config:
    config = dataclasses.replace(preset("digits", device="cpu", precision="fp32", batch_size=8), model=TINY)
    return override(config, changes)


def operation(**changes: Any) -> Operation:
    plain = Operation("mm", "student", "product", 1, 0, 0, "bf16", (), 0, "torch")
    return dataclasses.replace(plain, **changes)


# Prices


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 2e-6),
        ({"launches": 0, "bytes": 10**9}, 0),
        ({"launches": 3}, 6e-6),
        ({"bytes": 10**9}, 1e-3),
        ({"flops": 8 * 10**9}, 2e-3),
        ({"flops": 8 * 10**9, "precision": "fp32"}, 8e-3),
        ({"flops": 8 * 10**9, "precision": "fp16"}, 2e-3),
        ({"flops": 8 * 10**9, "bytes": 5 * 10**9}, 5e-3),
        ({"flops": 8 * 10**9, "kind": "attention"}, 4e-3),
        ({"flops": 8 * 10**9, "kind": "attention backward"}, 8e-3),
        ({"kind": "other", "precision": "", "bytes": 10**9}, 1e-3),
    ],
    ids=str,
)
def test_an_operation_takes_as_long_as_what_takes_longest(changes: dict[str, Any], expected: float) -> None:
    assert seconds(operation(**changes), GPU) == pytest.approx(expected)


def test_the_host_dispatches_each_operation() -> None:
    host = Host(dispatch=1, launch=10, operation=100, kernel=1000)
    for changes, expected in (
        ({}, 11),
        ({"launches": 0}, 1),
        ({"launches": 2}, 21),
        ({"host": "kernel"}, 1100),
        ({"host": ""}, 1000),
    ):
        assert host_seconds(operation(**changes), host) == expected


# The step


def test_the_flops_are_those_that_torch_counts_in_a_real_step() -> None:
    config = tiny(**{"quotient": "pair"})  # in float32 on the CPU: no operation of ours multiplies
    state = TrainState.build(config)
    images = torch.randn(8, 1, 8, 8), torch.zeros(8, dtype=torch.int64)
    counter = flop_counter()
    with counter:
        train_step(state, *images)
    assert sum(o.flops for o in count_step(config)) == pytest.approx(counter.get_total_flops(), rel=1e-9)


def test_the_parts_add_up() -> None:
    found = estimate_time(tiny(precision="bf16"), "h100")
    assert list(found.phases) == list(PHASES)
    assert all(p.launches > 0 and p.gpu > 0 and p.host > 0 for p in found.phases.values())
    operations = count_step(tiny(precision="bf16"))
    whole = phase_time(operations, GPUS["h100"], Host())
    for field in dataclasses.fields(whole):
        assert getattr(found.total, field.name) == pytest.approx(getattr(whole, field.name))
    assert found.graph == found.total.gpu and found.eager == max(found.total.gpu, found.total.host)
    assert (found.batch, found.precision) == (8, "bf16")


def test_of_many_micro_batches_all_are_counted() -> None:
    """Each but the first adds its gradients to those that are there."""
    whole, three, five = (
        count_step(tiny(precision="bf16", micro_batch=size, batch_size=size * parts), None)
        for size, parts in ((8, 1), (8, 3), (8, 5))
    )
    two = count_step(tiny(precision="bf16", micro_batch=8, batch_size=16), None)

    def launches(operations: list[Operation], *phases: str) -> int:
        return sum(o.launches for o in operations if o.phase in phases)

    assert launches(three, "update") == launches(five, "update")
    for phase in ("student", "target", "backward"):
        each = (launches(five, phase) - launches(three, phase)) / 2
        assert launches(three, phase) - launches(two, phase) == each > 0
        assert each >= launches(whole, phase)


def test_cheaper_steps_are_predicted_to_be_faster() -> None:
    config = tiny(precision="bf16")
    times = [estimate_time(config, gpu, batch=4096).graph for gpu in ("h200", "h100", "a100")]
    assert times == sorted(set(times))
    recomputing = estimate_time(override(config, {"run.recompute": "block"}), "h100")
    assert recomputing.total.flops > estimate_time(config, "h100").total.flops
    assert estimate_time(config, "h100", batch=64).total.bytes > estimate_time(config, "h100").total.bytes


def test_what_only_a_gpu_can_do_is_counted() -> None:
    for changes in (
        {"run.optimizer": "torch", "precision": "bf16"},
        {"precision": "tf32"},
        {"precision": "fp8", "run.cuda_graph": True, "run.compile": True},
        {"precision": "bf16", "quotient_precision": "fp16"},
    ):
        found = estimate_time(tiny(**changes), "a100")
        assert found.graph > 0 and found.precision == changes["precision"].replace("fp8", "bf16")


def test_a_wrong_configuration_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^batch_size must be in "):
        estimate_time(tiny(), "h100", batch=0)


def test_the_table_says_that_it_is_a_prediction() -> None:
    found = estimate_time(tiny(precision="bf16"), "a100")
    text = table(found)
    assert "A prediction by arithmetic, not a measurement" in text and text.startswith(GPUS["a100"].title)
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines()[2 : 3 + len(PHASES)]}
    assert [int(rows[name][0]) for name in PHASES] == [p.launches for p in found.phases.values()]
    assert float(rows["step"][4]) == pytest.approx(1e3 * found.graph, abs=0.006)
    assert re.search(r"as a CUDA graph [\d.]+ ms, \d+ images/s; uncaptured [\d.]+ ms", text)
    assert all(f"{rate / 1e12:g}" in text for rate in GPUS["a100"].products.values())
