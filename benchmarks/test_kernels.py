"""Each operation of soflow_kernels against eager PyTorch, torch.compile and other people's, in one run.

At the shapes of DiT-XL/2 on a GPU. On a CPU, small, where the operations are their references and the rows say so: that
the benchmark works is all that is seen there. pytest-benchmark's own table shows ours and, on a GPU, holds the write
that empties its caches too; `extra_info`, the summary and the record have every way. Nothing is asserted of the times.
"""

from collections.abc import Iterator

import pytest
import torch

from benchmarks.conftest import Rows
from benchmarks.harness import ceilings
from benchmarks.harness.kernel_race import KernelRace
from benchmarks.harness.operations import OURS, SHIPPED, SMALL, Operation, operations
from benchmarks.report import record

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FIRST = ("gate_residual_layernorm_modulate", "bias_gelu", "adamw_ema", "attention_increment")
"""The operations that a step spends most in beside its products."""
CASES = [
    (op, backward)
    for op in sorted(operations(DEVICE), key=lambda op: FIRST.index(op.name) if op.name in FIRST else len(FIRST))
    for backward in (False, True)
    if op.trains or not backward
]


@pytest.fixture(scope="module", autouse=True)
def copies(kernel_rows: Rows) -> Iterator[None]:
    """Time a copy, before and after everything else."""
    kernel_rows.keep(ceilings.copy(DEVICE))
    yield
    kernel_rows.found[0]["seconds"] += ceilings.copy(DEVICE)["seconds"]


@pytest.mark.parametrize(
    ("operation", "backward"), CASES, ids=[f"{op.name}{' backward' * backward}" for op, backward in CASES]
)
def test_kernel(
    benchmark, operation: Operation, backward: bool, kernel_rows: Rows, pytestconfig: pytest.Config
) -> None:
    try:
        race = KernelRace(operation, backward, SHIPPED if DEVICE.type == "cuda" else SMALL, DEVICE)
    except torch.OutOfMemoryError:
        pytest.skip(f"{operation.name} does not fit into this GPU's memory")
    if OURS not in race.timer.calls:
        pytest.skip(f"{operation.name}: {race.rows[1]['why_not']}")
    rounds = race.rounds(pytestconfig.option.kernel_seconds)
    benchmark.pedantic(race.timer.once, (OURS,), setup=lambda: race.run(but=OURS), rounds=rounds)
    assert len({len(row["seconds"]) for row in race.rows if row["why_not"] is None}) == 1, "every way, every round"
    kernel_rows.keep(*race.rows)
    benchmark.extra_info.update(record.environment(), errors=race.errors, ways={row["way"]: row for row in race.rows})
