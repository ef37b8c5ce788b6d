"""Trainings on mixtures: settings are what their names say, the averaged weights are judged."""

import re

import pytest
import torch

from benchmarks.baselines.central import CENTRAL
from benchmarks.harness.recipes import OURS
from benchmarks.studies.mixtures import problems, trainings
from benchmarks.studies.mixtures.settings import SETTINGS
from soflow_fast.config.validation import validate

BASE = "base: p = 0, r from 0.1 to 0.01"


def test_a_training_is_judged_against_the_data(one_thread, monkeypatch):
    """Of a network that gives the data themselves the distance is 0, of one that gives the noise it is not."""
    at = problems.held("ring", 40, 400)
    monkeypatch.setattr(trainings, "held", lambda name: at)
    monkeypatch.setattr(trainings, "errors", lambda flow, at: {})
    for ends, judge in ((at.data, lambda d: d == 0), (at.noise, lambda d: d > 0.1)):
        monkeypatch.setattr(trainings, "solved", lambda flow, x, t, s, ends=ends: ends)
        assert judge(trainings.judged("lambda: lambda = 0.25", "ring", 0, 1)[0]["distance"])


def test_the_distance_from_the_fixed_point_is_that_of_its_means(one_thread, monkeypatch):
    """Of two means of f_r the product counts, in the bias and in a network's distance from it."""
    at = problems.held("ring", 40, 400)
    monkeypatch.setattr(trainings, "held", lambda name: at)
    axis = torch.tensor([1.0, 0.0], dtype=torch.float64)
    both = [at.one_step.exact + k * axis for k in (0.5, 2.0)]
    monkeypatch.setattr(trainings, "fixed_point", lambda name, r: both)
    monkeypatch.setattr(trainings, "solved", lambda flow, x, t, s: at.one_step.exact + 4.5 * axis)
    row = trainings.long("ring", 0.1, 0, 1, 1)[0]
    assert row["bias"] == pytest.approx(1 / at.spread)
    assert row["points"][0]["from_fixed_point"] == pytest.approx((4 * 2.5) ** 0.5 / at.spread)


FACTORS = (
    {"p"},
    {"fm_fraction"},
    {"teacher", "teacher_decay"},
    {"r_init", "r_end", "r_schedule"},  # where r goes, and how
    {"kind", "p"},  # flow matching alone, with weights of its own
)
"""Fields of the objective that may differ from the base's together."""


def test_every_setting_differs_from_the_base_in_one_factor():
    configs = {name: problems.configuration("ring", 0, 10, **one.changes) for name, one in SETTINGS.items()}
    base = configs.pop(BASE)
    for name, config in configs.items():
        validate(config)
        one = SETTINGS[name]
        assert config != base or one.target is not None or one.recipe is not SETTINGS[BASE].recipe
        assert config.model == base.model and config.optim == base.optim and config.steps == base.steps
        changed = {field for field, value in vars(config.objective).items() if value != getattr(base.objective, field)}
        assert any(changed <= factor for factor in FACTORS), name


def test_settings_are_what_their_names_say():
    for one in SETTINGS.values():
        objective = problems.configuration("ring", 0, 10, **one.changes).objective
        assert (one.recipe is CENTRAL) == one.name.startswith("central")
        assert (one.target is not None) == (one.factor == "precision")
        if one.target is not None:
            precision, kind = one.name.split(",")[0].split()
            assert one.target == (kind, precision, "student")
        for said, field in {r"\bp = ([\d.]+)": "p", r"lambda = ([\d.]+)": "fm_fraction"}.items():
            assert not (found := re.search(said, one.name)) or getattr(objective, field) == float(found[1])
        if found := re.search(r"(?:from 0.1 )?to (0\.\d+)", one.name):
            assert (objective.r_init, objective.r_end) == (0.1, float(found[1])) and objective.r_schedule != "constant"
        elif found := re.search(r"\br = (0\.\d+)", one.name):
            assert (objective.r_schedule, objective.r_end) == ("constant", float(found[1]))
        if one.factor == "teacher":
            assert (objective.teacher, objective.teacher_decay) == ("ema", float(one.name.split()[-1]))


def test_a_setting_trains_as_it_says(one_thread):
    """Its own step and its own way to the quotient: after the same steps on the same data no two have the same
    weights."""
    names = (BASE, "difference: central, r from 0.1 to 0.01", "precision: bf16 pair, r to 0.01")
    made = {name: trainings.trained(SETTINGS[name], "ring", 0, 2)[0] for name in names}
    found = [torch.cat([p.flatten() for p in state.flow.parameters()]) for state in made.values()]
    for k, j in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(found[k], found[j])
    assert made[names[2]].target == SETTINGS[names[2]].target != made[BASE].target
    again = trainings.base("ring", 2)
    assert torch.equal(found[0], torch.cat([p.flatten() for p in again.flow.parameters()]))


def test_the_averaged_weights_are_judged_after_fresh_data(one_thread, monkeypatch):
    """In both kinds of training each step has its own batch, and whoever judges gets the average."""
    at, made, given, steps = problems.held("ring", 40, 400), [], [], []

    def build(config):
        made.append(OURS.build(config))
        return made[-1]

    def batch(data, config, step):
        steps.append(step)
        return problems.batch(data, config, step)

    def judge(flow, *rest):
        given.append(flow)
        return at.noise if len(rest) == 3 and rest[0] is at.noise else at.one_step.exact if len(rest) == 3 else {}

    recipe = OURS._replace(build=build)
    monkeypatch.setattr(trainings, "held", lambda name: at)
    monkeypatch.setattr(trainings, "OURS", recipe)
    monkeypatch.setattr(trainings, "batch", batch)
    monkeypatch.setattr(trainings, "fixed_point", lambda name, r: (at.one_step.exact,) * 2)
    monkeypatch.setitem(trainings.SETTINGS, BASE, trainings.SETTINGS[BASE]._replace(recipe=recipe, calls=False))
    for name in ("errors", "solved"):
        monkeypatch.setattr(trainings, name, judge)
    for work in (lambda: trainings.judged(BASE, "ring", 0, 2), lambda: trainings.long("ring", 0.1, 0, 2, 2)):
        steps.clear()
        given.clear()
        work()
        assert steps == [0, 1] and len(given) == 2 and all(flow is made[-1].ema for flow in given)
