"""Fixtures of the benchmarks' tests: a race that was run once, and records that have nothing to warn of."""

import gc

import pytest
import torch

from benchmarks.baselines.authors import AUTHORS
from benchmarks.harness import ceilings
from benchmarks.harness.contestants import DIFFERENCE, MEANFLOW, QUARTER
from benchmarks.harness.race import Race
from benchmarks.harness.recipes import OURS
from benchmarks.report import record
from tests.benchmarks.tiny import CASE


@pytest.fixture
def committed(monkeypatch):
    """Whatever the state of the tree that is tested, records have nothing to warn of."""
    monkeypatch.setattr(record, "commit", lambda: "0123456789ab")


@pytest.fixture
def one_thread():
    """For studies, which set the number of threads of their process: it is as it was afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def small_ceilings():
    """Ceilings of a moment, and collections of garbage that pass over what was imported."""
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ceilings.SIDE, "cpu", 64)
        patch.setitem(ceilings.BYTES, "cpu", 2**16)
        yield
    ceilings.product_ceiling.cache_clear()
    ceilings.copy_ceiling.cache_clear()
    gc.unfreeze()


@pytest.fixture(scope="session")
def race_rows() -> list[dict]:
    """The rows of a race of five recipes, one of which is absent."""
    absent = AUTHORS._replace(name="absent", why_not=lambda config: "is elsewhere")
    race = Race(CASE, [OURS, AUTHORS, MEANFLOW, QUARTER, DIFFERENCE, absent])
    (names,) = race.groups()
    assert [race.enter(name) for name in names] == [True] * 5 + [False]
    for _ in range(race.timer.rounds_within(0.0, least=5, most=100)):
        race.timer.round(but=OURS.name)
        race.timer.once(OURS.name)
    return race.results()
