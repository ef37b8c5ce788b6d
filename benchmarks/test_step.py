"""Our training step in several guises against the authors' recipe and MeanFlow, on the same network and batch.

On a CPU each round is a step of every baseline and then one of ours, so that whatever else the machine does hits all
alike; on a GPU each is alone in memory, one after the other. pytest-benchmark's own table shows ours; `extra_info`, the
summary and the record have every recipe, each on disk as soon as it was timed. Nothing is asserted of the times. A
recipe that computes something else, or fails otherwise, is named in the record, and fails the test once the others have
been timed.
"""

from functools import partial

import pytest
import torch

from benchmarks.conftest import Rows
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
    return HEADLINE if pytestconfig.option.headline else CONTESTANTS


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_step(benchmark, case: Case, rows: Rows, contestants: list[Recipe], pytestconfig: pytest.Config) -> None:
    if pytestconfig.option.batch is not None:
        case = case.at(pytestconfig.option.batch)
    race = Race(case, contestants)
    groups, known = race.groups(), list(rows.found)
    for names in groups:
        try:
            if [race.enter(name) for name in names].count(True):
                timer = race.timer
                rounds = timer.rounds_within(pytestconfig.option.seconds / len(groups), least=5, most=100)
                if OURS.name in timer.calls:
                    others = partial(timer.round, but=OURS.name)
                    benchmark.pedantic(partial(timer.once, OURS.name), setup=others, rounds=rounds)
                else:
                    for _ in range(rounds):
                        timer.round()
        except torch.OutOfMemoryError as error:  # beside the others, where they are in memory together
            for name in race.timer.calls:
                race.failed(name, error)
        finally:
            race.leave()
        rows.found[:] = [*known, *race.results()]
        rows.keep()
    mine = race.results()
    assert len({len(row["seconds"]) for row in mine if row["seconds"]}) == 1 or len(groups) > 1, "all in every round"
    benchmark.extra_info.update(record.environment(), ratios=speed_ups(mine))
    benchmark.extra_info["recipes"] = [row | (figures(row) if row["seconds"] else {}) for row in mine]
    fallen = [f"{row['recipe']}: {row['skipped']}" for row in mine if row["failed"]]
    assert not fallen, "; ".join(fallen)
    if race.rows[OURS.name].skipped:
        pytest.skip(f"{case.name} does not fit into this machine's memory")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the largest batch that fits is a question for a GPU")
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_largest_batch(case: Case, rows: Rows, contestants: list[Recipe]) -> None:
    fallen = []
    for recipe in contestants:
        row = largest(case, recipe)
        rows.keep(row.as_dict())
        if row.failed:
            fallen.append(f"{recipe.name}: {row.skipped}")
    assert not fallen, "; ".join(fallen)
