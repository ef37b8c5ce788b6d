"""Our training step in several guises against the authors' recipe and MeanFlow, on the same network and batch.

Each round is a step of every baseline and then one of ours, so that whatever else the machine does hits all alike.
Where a GPU's memory does not hold all at a time they come in heats, each with ours in it. pytest-benchmark's own table
shows ours; `extra_info`, the summary and the record have every recipe. Nothing is asserted of the times.
"""

import pytest
import torch

from benchmarks import record
from benchmarks.cases import Case, cases
from benchmarks.contestants import CONTESTANTS
from benchmarks.race import Race, figures, heats, largest, speed_ups
from benchmarks.recipes import OURS

# What torch says to itself while it compiles is no error of ours.
pytestmark = pytest.mark.filterwarnings("default::UserWarning", "default::DeprecationWarning", "default::FutureWarning")


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_step(benchmark, case: Case, rows: list[dict], pytestconfig: pytest.Config) -> None:
    if pytestconfig.option.batch is not None:
        case = case.at(pytestconfig.option.batch)
    groups = heats(case, CONTESTANTS[1:])
    found: list[dict] = []
    for k, baselines in enumerate(groups):
        try:
            race = Race(case, baselines)
            rounds = race.rounds(pytestconfig.option.seconds / len(groups))
            if k == 0:
                benchmark.pedantic(race.steps[OURS.name], setup=race.run_baselines, rounds=rounds)
            else:
                for _ in range(rounds):
                    race.run_baselines()
                    race.steps[OURS.name]()
        except torch.OutOfMemoryError:
            pytest.skip(f"{case.name} does not fit into this GPU's memory")
        heat = [row.as_dict() for row in race.rows.values()]
        assert len({len(row["seconds"]) for row in heat if not row["skipped"]}) == 1, "all take part in every round"
        for row in heat if len(groups) > 1 else ():
            row["case"] += f", heat {k + 1} of {len(groups)}"
        found += heat
        del race
    rows += found
    benchmark.extra_info.update(
        record.environment(),
        ratios=speed_ups(found[: len(groups[0]) + 1]),
        recipes=[row | (figures(row) if row["seconds"] else {}) for row in found],
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the largest batch that fits is a question for a GPU")
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_largest_batch(case: Case, rows: list[dict]) -> None:
    rows += [largest(case, recipe).as_dict() for recipe in CONTESTANTS]
