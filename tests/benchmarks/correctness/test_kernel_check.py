"""The check of an operation: what a way may err by, as a whole and in its worst row, in either dtype."""

from dataclasses import replace

import pytest
import torch

import soflow_kernels
from benchmarks.correctness import kernels
from benchmarks.correctness.comparison import IncorrectResult
from benchmarks.harness.kernel_race import KernelRace
from benchmarks.harness.operations import EAGER, OURS
from tests.benchmarks.tiny import CPU, OPERATIONS
from tests.benchmarks.tiny import SIZES as TINY

MANY = TINY._replace(samples=256)


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

    race = KernelRace(replace(operation, others={"theirs": way}), False, MANY, CPU, dtype)
    rows = {row["way"]: row for row in race.rows}
    assert "theirs against float64: output 0" in rows["theirs"]["why_not"] and "theirs" not in race.timer.calls
    assert set(rows[OURS]["errors"]) == {"output 0"}
    with pytest.raises(IncorrectResult, match="layernorm_modulate against float64: output 0"):
        KernelRace(replace(operation, ours=way), False, MANY, CPU, dtype)


def test_a_way_that_rounds_less_than_eager_passes_in_bfloat16():
    """As fused kernels do: float32 inside, one rounding at the end; backward too."""
    operation = OPERATIONS["gate_residual_layernorm_modulate"]

    def fused(**inputs):
        return tuple(out.bfloat16() for out in operation.reference(**{name: v.float() for name, v in inputs.items()}))

    race = KernelRace(replace(operation, ours=fused, others={"fused": fused}), True, MANY, CPU, torch.bfloat16)
    assert set(race.timer.calls) == {OURS, EAGER, "fused"}


def test_a_result_of_another_shape_is_found():
    operation = OPERATIONS["layernorm_modulate"]
    others = {"flat": lambda **inputs: operation.reference(**inputs)[:1]}
    race = KernelRace(replace(operation, others=others), False, TINY, CPU)
    why = {row["way"]: row["why_not"] for row in race.rows}["flat"]
    assert why == "flat against float64: output 0: has shape [1, 4, 16]"


def test_an_eager_operation_that_loses_its_digits_is_no_yardstick():
    """A reference that cancels in float32, and does not in float64."""
    operation = OPERATIONS["silu_increment"]

    def cancels(x):
        return operation.reference(x + 1e6 - 1e6)

    with pytest.raises(IncorrectResult, match="eager PyTorch against float64"):
        KernelRace(replace(operation, reference=cancels), False, TINY, CPU)


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
    found = kernels.exactly(operation, operation.inputs(TINY, CPU, torch.bfloat16), True)
    assert seen == [torch.float64, torch.float32]
    assert all(result.dtype == torch.float32 for result in found.values())
    with pytest.raises(torch.OutOfMemoryError):
        kernels.exactly(operation, operation.inputs(TINY, CPU, torch.float32), True)


def off(operation):
    """The operation with its first result, or what it writes to first, 1 % off in one element of every sixteen."""

    def bend(tensor):
        bent = torch.ones(tensor.numel(), dtype=tensor.dtype)
        bent[::16] = 1.01
        return tensor * bent.view(tensor.shape)

    def wrong(**inputs):
        outputs = operation.ours(**inputs)
        if operation.writes:
            first = inputs[operation.writes[0]][0]
            first.copy_(bend(first))
            return outputs
        return (bend(outputs[0]), *outputs[1:]) if isinstance(outputs, tuple) else bend(outputs)

    return replace(operation, ours=wrong)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_tampered_operation_is_found(name):
    with pytest.raises(IncorrectResult, match=f"{name} against float64"):
        KernelRace(off(OPERATIONS[name]), False, TINY, CPU)


@pytest.mark.parametrize("name", [name for name, op in OPERATIONS.items() if op.trains])
def test_a_tampered_backward_is_found(name):
    """A gradient twice as large, behind a result that is right."""

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    operation = OPERATIONS[name]
    first = operation.trains[0]

    def wrong(**inputs):
        twice = (Twice.apply(inputs[first][0]), *inputs[first][1:]) if isinstance(inputs[first], tuple) else None
        return operation.ours(**inputs | {first: Twice.apply(inputs[first]) if twice is None else twice})

    KernelRace(replace(operation, ours=wrong), False, TINY, CPU)
    with pytest.raises(IncorrectResult, match=f"gradient of {first}"):
        KernelRace(replace(operation, ours=wrong), True, TINY, CPU)


def test_nan_is_found():
    def wrong(x):
        out = soflow_kernels.silu_increment(x)
        out[0, 0, 0] = torch.nan
        return out

    with pytest.raises(IncorrectResult, match=r"output 0: relative error nan.*worst row: relative error nan"):
        KernelRace(replace(OPERATIONS["silu_increment"], ours=wrong), False, TINY, CPU)
