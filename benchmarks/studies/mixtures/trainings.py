"""Trainings on a mixture: to the end and judged once, or long at a constant r and judged on the way.

Time is that of the process: others may share the machine.
"""

import functools
import time

import torch
from torch import Tensor

from benchmarks.baselines.central import CENTRAL
from benchmarks.exact.estimates import root_mean_square
from benchmarks.harness.recipes import OURS
from benchmarks.studies.mixtures.measures import by_calls, errors, sliced_distance
from benchmarks.studies.mixtures.minimisers import means
from benchmarks.studies.mixtures.problems import batch, configuration, held, mixture, solved
from benchmarks.studies.mixtures.settings import BASE, CONSTANT, SETTINGS, Setting
from soflow_fast.rng import generator
from soflow_fast.training.state import TrainState


def trained(setting: Setting, name: str, seed: int, steps: int) -> tuple[TrainState, float]:
    """The state after the last step, and seconds of the processor."""
    config, data = configuration(name, seed, steps, **setting.changes), mixture(name)
    state = setting.recipe.build(config)
    state.target = setting.target or state.target
    began = time.process_time()
    while state.step < steps:
        setting.recipe.step(state, batch(data, config, state.step), torch.zeros(config.batch_size, dtype=torch.int64))
    return state, time.process_time() - began


def judged(setting_name: str, name: str, seed: int, steps: int) -> list[dict]:
    """Train one of `SETTINGS` to the last step; a row with the errors of the averaged weights, and one for each
    way to sample."""
    torch.set_num_threads(1)
    setting = SETTINGS[setting_name]
    state, seconds = trained(setting, name, seed, steps)
    at, flow = held(name), state.ema
    what = {"problem": name, "factor": setting.factor, "setting": setting.name, "seed": seed, "steps": steps}
    row = {"kind": "training", **what, "cpu_seconds": seconds, **errors(flow, at)}
    one = torch.ones(len(at.noise), dtype=at.noise.dtype)
    ends = solved(flow, at.noise, one, 0 * one)
    row["distance"] = sliced_distance(ends, at.data) / at.spread
    return [row, *({"kind": "calls", **what, **found} for found in (by_calls(flow, at) if setting.calls else ()))]


@functools.cache
def fixed_point(name: str, r: float) -> tuple[Tensor, Tensor]:
    """f_r(x_1, 1, 0) at the held noises, by two independent means [n, D]."""
    return means(mixture(name), held(name).one_step.x, r, generator(0, 0, 0, f"chains of {name} at {r:g}"))


def long(name: str, r: float, seed: int, steps: int, every: int, central: bool = False) -> list[dict]:
    """Train at a constant r and rate, by a look-ahead or a central difference; after every `every` steps the errors,
    and the distance from f_r at the same r."""
    torch.set_num_threads(1)
    changes = CONSTANT | {"objective__r_end": r, "optim__lr_schedule": "constant", "optim__lr": 1e-3}
    config, data, at = configuration(name, seed, steps, **changes), mixture(name), held(name)
    a, b = fixed_point(name, r)
    noise, t, s, exact = at.one_step
    bias, _ = root_mean_square(a - exact, b - exact)
    recipe, y = CENTRAL if central else OURS, torch.zeros(config.batch_size, dtype=torch.int64)
    state, points, seconds = recipe.build(config), [], 0.0
    while state.step < steps:
        began = time.process_time()
        for _ in range(min(every, steps - state.step)):
            recipe.step(state, batch(data, config, state.step), y)
        seconds += time.process_time() - began
        found = solved(state.ema, noise, t, s)
        distance, _ = root_mean_square(found - a, found - b)
        point = {"step": state.step, "cpu_seconds": seconds, **errors(state.ema, at)}
        points.append(point | {"from_fixed_point": distance / at.spread})
    row = {"kind": "long", "problem": name, "r": r, "seed": seed, "steps": steps, "points": points}
    return [row | {"bias": bias / at.spread}]


def base(name: str, steps: int) -> TrainState:
    """The first of all trainings."""
    return trained(BASE, name, 0, steps)[0]
