"""Our training step against the authors' recipe, on the same network and batch, in one run.

Each round is a step of every baseline and then one of ours, so that whatever else the machine does hits all alike.
pytest-benchmark's own table shows ours; `extra_info`, the summary and the record have every recipe. Nothing is asserted
of the times.
"""

import pytest
import torch

from benchmarks import record
from benchmarks.baselines.authors import AUTHORS
from benchmarks.cases import Case, cases
from benchmarks.race import Race, figures, speed_ups
from benchmarks.recipes import OURS


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_step(benchmark, case: Case, rows: list[dict], pytestconfig: pytest.Config) -> None:
    try:
        race = Race(case, [AUTHORS])
        rounds = race.rounds(pytestconfig.option.seconds)
        benchmark.pedantic(race.steps[OURS.name], setup=race.run_baselines, rounds=rounds)
    except torch.OutOfMemoryError:
        pytest.skip(f"{case.name} does not fit into this GPU's memory")
    found = [row.as_dict() for row in race.rows.values()]
    assert len({len(row["seconds"]) for row in found}) == 1, "every recipe takes part in every round"
    rows += found
    benchmark.extra_info.update(
        record.environment(),
        ratios=speed_ups(found),
        gates=race.gates,
        recipes={row["recipe"]: row | figures(row) for row in found},
    )
