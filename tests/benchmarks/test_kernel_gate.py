"""The gate of the race of operations: what a way may err by, as a whole and in its worst row, in either dtype."""

from dataclasses import replace

import pytest
import torch

from benchmarks import kernels, operations
from benchmarks.gates import RedGate
from benchmarks.operations import Sizes

CPU = torch.device("cpu")
TINY = Sizes(samples=4, tokens=4, width=16, heads=2, blocks=1)
MANY = TINY._replace(samples=256)
OPERATIONS = {op.name: op for op in operations.operations(CPU)}


def lost(out):
    """One sample of 256 is zero: a norm over all sees 1 / 16 of it, the root of bfloat16's unit is 0.09."""
    return torch.cat([out[:-1], 0 * out[:1]])


def spoilt(out):
    """One number of 16 384 is off by a quarter of the largest: 1 % in a norm, where bfloat16 rounds by 0.3 %."""
    out = out.clone()
    out[7, 1, 3] += 0.25 * out[7].abs().max()
    return out


def shifted(out):
    return 1.05 * out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [lost, spoilt, shifted])
def test_every_way_is_held_to_its_dtype_at_the_shape_that_is_timed(wrong, dtype):
    operation = OPERATIONS["layernorm_modulate"]

    def way(**inputs):
        return wrong(operation.reference(**inputs))

    race = kernels.KernelRace(replace(operation, others={"theirs": way}), False, MANY, CPU, dtype)
    rows = {row["way"]: row for row in race.rows}
    assert "theirs against float64: output 0" in rows["theirs"]["why_not"] and "theirs" not in race.steps
    assert set(rows[kernels.OURS]["gate"]) == {"output 0"}
    with pytest.raises(RedGate, match="layernorm_modulate against float64: output 0"):
        kernels.KernelRace(replace(operation, ours=way), False, MANY, CPU, dtype)


def test_a_way_that_rounds_less_than_eager_passes_in_bfloat16():
    """As fused kernels do: float32 inside, one rounding at the end; backward too."""
    operation = OPERATIONS["gate_residual_layernorm_modulate"]

    def fused(**inputs):
        return tuple(out.bfloat16() for out in operation.reference(**{name: v.float() for name, v in inputs.items()}))

    race = kernels.KernelRace(replace(operation, ours=fused, others={"fused": fused}), True, MANY, CPU, torch.bfloat16)
    assert set(race.steps) == {kernels.OURS, kernels.EAGER, "fused"}


def test_a_result_of_another_shape_is_red():
    operation = OPERATIONS["layernorm_modulate"]
    others = {"flat": lambda **inputs: operation.reference(**inputs)[:1]}
    race = kernels.KernelRace(replace(operation, others=others), False, TINY, CPU)
    why = {row["way"]: row["why_not"] for row in race.rows}["flat"]
    assert why == "flat against float64: output 0: has shape [1, 4, 16]"


def test_an_eager_operation_that_loses_its_digits_is_no_yardstick():
    """A reference that cancels in float32, and does not in float64."""
    operation = OPERATIONS["silu_increment"]

    def cancels(x):
        return operation.reference(x + 1e6 - 1e6)

    with pytest.raises(RedGate, match="eager PyTorch against float64"):
        kernels.KernelRace(replace(operation, reference=cancels), False, TINY, CPU)


def test_errors_of_rows():
    exact = torch.ones(4, 8, dtype=torch.float64)
    exact[3] = 1e-6  # what is left of a sum that cancels
    result = exact.clone()
    assert kernels.error_of(result, exact) == (0.0, 0.0)
    result[3] += 1e-6
    assert kernels.error_of(result, exact).worst == pytest.approx(1e-6 / 0.0075, rel=1e-5)
    result[1, 2] = 1.5
    assert kernels.error_of(result, exact).worst == 0.5
    zero = torch.zeros(2, 2)
    assert kernels.error_of(zero, zero) == (0.0, 0.0) and kernels.error_of(zero + 1, zero).worst == torch.inf


def test_float32_stands_in_where_memory_does_not_hold_float64(monkeypatch):
    plain, seen = kernels.prepare, []

    def prepare(operation, way, inputs, backward):
        seen.append(inputs["x"].dtype)
        if inputs["x"].dtype == torch.float64:
            raise torch.OutOfMemoryError("none left")
        return plain(operation, way, inputs, backward)

    monkeypatch.setattr(kernels, "prepare", prepare)
    operation = OPERATIONS["bias_gelu"]
    assert kernels.KernelRace(operation, True, TINY, CPU, torch.bfloat16).steps
    assert seen == [torch.float64, torch.float32, torch.bfloat16, torch.bfloat16]
    with pytest.raises(torch.OutOfMemoryError):
        kernels.KernelRace(operation, True, TINY, CPU, torch.float32)
