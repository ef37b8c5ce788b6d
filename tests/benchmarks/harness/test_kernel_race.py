"""The race of one operation: every way in turn, the bytes that it moves, and its table."""

from dataclasses import replace

import pytest
import torch

import soflow_kernels
from benchmarks.harness import ceilings, kernel_race, operations
from benchmarks.harness.kernel_race import KernelRace
from benchmarks.harness.operations import COMPILED, EAGER, OURS
from benchmarks.report import pages, record, tables
from tests.benchmarks.tiny import CPU, OPERATIONS
from tests.benchmarks.tiny import SIZES as TINY

CASES = [(op, backward) for op in OPERATIONS.values() for backward in (False, True) if op.trains or not backward]


def test_every_operation_takes_part():
    assert {name.split(",")[0] for name in OPERATIONS} == set(soflow_kernels.OPERATIONS)


@pytest.mark.parametrize(
    ("operation", "backward"), CASES, ids=[f"{op.name}{' backward' * backward}" for op, backward in CASES]
)
def test_ways_are_timed_in_turn(operation, backward):
    race = KernelRace(operation, backward, TINY, CPU)
    for _ in range(race.rounds(0.0)):
        race.run()
    rows = {row["way"]: row for row in race.rows}
    assert len(rows[OURS]["seconds"]) == len(rows[EAGER]["seconds"]) == 7
    assert rows[OURS]["runs"].startswith("reference: ")
    assert rows[COMPILED]["why_not"] and not rows[COMPILED]["seconds"]
    assert all(row["why_not"] for row in race.rows if row["way"] in operation.others)
    gradients = [name.removeprefix("gradient of ").split("[")[0] for name in race.errors if "gradient" in name]
    assert tuple(dict.fromkeys(gradients)) == operation.trains * backward


def test_another_way_that_is_wrong_or_raises_is_not_timed():
    def raises(**inputs):
        raise RuntimeError("no such\ndevice")

    operation = OPERATIONS["layernorm_modulate"]
    others = {"wrong": lambda x, shift, scale: 0 * x, "raises": raises, "absent": "it is not installed"}
    race = KernelRace(replace(operation, others=others), False, TINY, CPU)
    why = {row["way"]: row["why_not"] for row in race.rows}
    assert why["wrong"].startswith("wrong against float64: output 0: relative error 1.0e+00 above ")
    assert (why["raises"], why["absent"]) == ("RuntimeError: no such device", "it is not installed")
    assert set(race.timer.calls) == {OURS, EAGER}


def test_on_a_gpu_ways_are_timed_as_graphs_or_say_why_not(monkeypatch):
    """Stand-ins for recordings: one works, one is refused; what works in place is timed as it is called."""
    race = KernelRace(OPERATIONS["layernorm_modulate"], False, TINY, CPU)
    assert {row["timed"] for row in race.rows if row["why_not"] is None} == {"as called"}
    race.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(kernel_race, "recorded", lambda call, device: len)
    assert race._recorded(print) == (len, "as a CUDA graph")

    def refuse(call, device):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(kernel_race, "recorded", refuse)
    call, how = race._recorded(print)
    assert call is print and how.endswith("no CUDA graph (operation not permitted when stream is capturing)")
    race.operation = OPERATIONS["adamw_ema"]
    assert race._recorded(print) == (print, "as called")
    rows = [{"operation": "copy", "bytes": 1, "seconds": [1.0]}, *race.rows]
    rows[1].update(timed=how, seconds=[1.0])
    rows[2]["seconds"] = [1.0]
    assert "eager PyTorch, host included" in tables.kernel_table(rows)


def test_bytes_are_those_of_the_docstrings():
    shipped, half, single = operations.SHIPPED, torch.bfloat16, torch.float32
    stream = 65_536 * 1152 * 2  # "S is 151 MB"
    assert round(stream / 1e6) == 151
    found = OPERATIONS["gate_residual_layernorm_modulate"]
    assert (found.traffic(shipped, half, False), found.traffic(shipped, half, True)) == (4 * stream, 10 * stream)
    assert OPERATIONS["bias_gelu"].traffic(shipped, half, False) == 2 * 4 * stream
    assert OPERATIONS["layernorm_modulate_increment"].traffic(shipped, half, False) == 3 * stream // 4
    assert OPERATIONS["consistency_loss"].traffic(shipped, single, True) == 6 * 256 * 4 * 32 * 32 * 4
    for name, bytes_of_gradient, copies in (("adamw_ema", 4, 0), ("adamw_ema, bfloat16 gradients and copies", 2, 4)):
        inputs = OPERATIONS[name].inputs(TINY, CPU, single)
        count = sum(p.numel() for p in inputs["params"])
        assert inputs["grads"][0].itemsize == bytes_of_gradient
        wanted = count * (3 * 8 + 8 + bytes_of_gradient + copies)
        assert OPERATIONS[name].traffic(TINY, single, False) == wanted
    assert OPERATIONS["linear_gelu"].traffic(shipped, half, True) is None


@pytest.fixture
def kernel_rows():
    rows = [ceilings.copy(CPU, rounds=3, size=4096)]
    race = KernelRace(OPERATIONS["layernorm_modulate"], True, TINY, CPU)
    for _ in range(race.rounds(0.0)):
        race.run()
    return rows + race.rows


def test_kernel_table(kernel_rows, tmp_path):
    copy, *rows = kernel_rows
    assert copy["bytes"] == 8192 and len(copy["seconds"]) == 3
    text = tables.kernel_table(kernel_rows)
    assert "| layernorm_modulate, forward + backward: 4 x 4 x 16, float32 | soflow_kernels (reference: " in text
    assert "torch.compile" in text and "not installed" in text and "%" not in text

    # As if on a GPU, where 5 S in as many seconds as a copy of the same bytes took is its whole bandwidth.
    for row in rows:
        row["runs"] = "kernel" if row["way"] == OURS else None
        row["seconds"] = [5 * 4 * 4 * 16 * 4 / 8192] * 7
    copy["seconds"] = [1.0]
    assert "| 0.005120 | 100% |" in tables.kernel_table(kernel_rows)

    record.write(kernel_rows, "pytest benchmarks/test_kernels.py --record", tmp_path, "kernels")
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "kernels.md"
    page.write_text("<!-- benchmark:kernels -->\n<!-- /benchmark:kernels -->\n")
    assert pages.main([], tmp_path, tmp_path) == 0 and "A copy moves" in page.read_text()
