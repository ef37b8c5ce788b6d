"""Our training step in several guises against the authors' recipe and MeanFlow, on the same network and batch.

Each round is a step of every baseline and then one of ours, so that whatever else the machine does hits all alike.
Where a GPU's memory does not hold all at a time they come in heats, each with ours in it. pytest-benchmark's own table
shows ours; `extra_info`, the summary and the record have every recipe. Nothing is asserted of the times. A baseline
that computes something else, or fails otherwise, is named in the record, and fails the test once the others have been
timed.
"""

from functools import partial

import pytest
import torch

from benchmarks.harness.cases import Case, cases
from benchmarks.harness.contestants import CONTESTANTS, HEADLINE
from benchmarks.harness.race import Race, figures, largest, speed_ups
from benchmarks.harness.recipes import OURS, Recipe
from benchmarks.report import record

# What torch says to itself while it compiles is no error of ours.
pytestmark = pytest.mark.filterwarnings("default::UserWarning", "default::DeprecationWarning", "default::FutureWarning")


@pytest.fixture
def contestants(pytestconfig: pytest.Config) -> list[Recipe]:
    """Ours, then the baselines."""
    return [recipe for recipe in CONTESTANTS if recipe in HEADLINE or not pytestconfig.option.headline]


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_step(benchmark, case: Case, rows: list[dict], contestants: list[Recipe], pytestconfig: pytest.Config) -> None:
    if pytestconfig.option.batch is not None:
        case = case.at(pytestconfig.option.batch)
    try:
        race = Race(case, contestants[1:])
        heats = race.heats()
        for k, names in enumerate(heats):
            race.warm_up(names)
            timer = race.timer
            rounds = timer.rounds_within(pytestconfig.option.seconds / len(heats), least=5, most=100)
            ours, others = partial(timer.once, OURS.name), partial(timer.round, but=OURS.name)
            if k == 0:
                benchmark.pedantic(ours, setup=others, rounds=rounds)
            else:
                for _ in range(rounds):
                    others()
                    ours()
            heat = race.results([n for n in names if n in timer.calls], f", heat {k + 1} of {len(heats)}" * (k > 0))
            assert len({len(row["seconds"]) for row in heat}) == 1, "all take part in every round"
            if k == 0:
                benchmark.extra_info.update(record.environment(), ratios=speed_ups(heat))
            rows += heat
    except torch.OutOfMemoryError:
        pytest.skip(f"{case.name} does not fit into this GPU's memory")
    absent = race.absent()
    rows += absent
    timed = [row for row in rows if row["case"].startswith(case.describe())]
    benchmark.extra_info["recipes"] = [row | (figures(row) if row["seconds"] else {}) for row in timed]
    fallen = [f"{row['recipe']}: {row['skipped']}" for row in absent if row["failed"]]
    assert not fallen, "; ".join(fallen)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the largest batch that fits is a question for a GPU")
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_largest_batch(case: Case, rows: list[dict], contestants: list[Recipe]) -> None:
    fallen = []
    for recipe in contestants:
        row = largest(case, recipe)
        rows.append(row.as_dict())
        if row.failed:
            fallen.append(f"{recipe.name}: {row.skipped}")
    assert not fallen, "; ".join(fallen)
