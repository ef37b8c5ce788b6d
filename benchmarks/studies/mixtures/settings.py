"""What is trained: the setting of `problems.configuration`, and from it one factor at a time."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from benchmarks.baselines.central import CENTRAL
from benchmarks.harness.recipes import OURS, Recipe
from benchmarks.studies.mixtures.problems import RING, SCATTERED
from soflow_fast.training.consistency_target import ConsistencyTarget


class Setting(NamedTuple):
    """One way to train."""

    factor: str
    name: str
    changes: Mapping[str, Any] = MappingProxyType({})
    """Fields of the configuration by their names, as "objective__p"."""
    recipe: Recipe = OURS
    target: ConsistencyTarget | None = None
    """Taken in place of the configuration's, as float16 is refused on processors that lack it."""
    problems: tuple[str, ...] = (RING,)
    calls: bool = False
    """Whether samples of several calls are judged."""


BOTH = (RING, SCATTERED)
BASE = Setting("base", "p = 0, r from 0.1 to 0.01", problems=BOTH, calls=True)
CONSTANT = {"objective__r_schedule": "constant"}
FLOW_MATCHING = {"objective__kind": "flow-matching"}
WAYS = {
    "bf16 pair": ConsistencyTarget("pair", "bf16", "student"),
    "fp16 pair": ConsistencyTarget("pair", "fp16", "student"),
    "bf16 increments": ConsistencyTarget("increments", "bf16", "student"),
}
"""Ways to take the increment behind the quotient in a float32 step; the base takes a float32 pair."""


def _settings() -> list[Setting]:
    found = [BASE]
    for p in (1.0, 0.5):
        found.append(Setting("p", f"p = {p:g}", {"objective__p": p}, problems=BOTH, calls=p == 1))
    for p in (0.0, 1.0, 0.5):
        changes = FLOW_MATCHING | {"objective__p": p}
        found.append(Setting("flow matching", f"p = {p:g}", changes, problems=BOTH, calls=True))
    at_once = CONSTANT | {"objective__r_end": 0.1}
    found.append(Setting("difference", "ahead, r = 0.1", at_once, problems=BOTH))
    found.append(Setting("difference", "central, r = 0.1", at_once, CENTRAL, problems=BOTH))
    found.append(Setting("difference", "central, r from 0.1 to 0.01", {}, CENTRAL, problems=BOTH))
    for r in (0.002, 0.0003):
        found.append(Setting("r", f"r from 0.1 to {r:g}", {"objective__r_end": r}, problems=BOTH))
        for way, target in WAYS.items():
            found.append(Setting("precision", f"{way}, r to {r:g}", {"objective__r_end": r}, target=target))
    for way in ("bf16 pair", "bf16 increments"):
        found.append(Setting("precision", f"{way}, r to 0.01", target=WAYS[way]))
    for fraction in (0.25, 0.75):
        found.append(Setting("lambda", f"lambda = {fraction:g}", {"objective__fm_fraction": fraction}))
    for decay in (0.9, 0.99, 0.999):
        changes = {"objective__teacher": "ema", "objective__teacher_decay": decay}
        found.append(Setting("teacher", f"average, decay {decay:g}", changes))
    found.append(Setting("r", "r = 0.01 throughout", CONSTANT))
    for schedule in ("cosine", "linear"):
        found.append(Setting("r", f"r from 0.1 to 0.01, {schedule}", {"objective__r_schedule": schedule}))
    return found


SETTINGS = {f"{one.factor}: {one.name}": one for one in _settings()}
"""All of them, those first that questions hang on most."""
