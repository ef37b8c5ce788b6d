"""`python -m benchmarks.precision`: the effect of rounding on the consistency quotient and on samples, as a record.

Errors: a small DiT is trained on the digits from a seed, in float32; then the quotient of 256 samples is taken in every
way and held against float64, at several r. Quality: the digits are trained in every way, seed by seed, and judged.
`python -m benchmarks.report` makes the tables and the plot of docs/precision.md from the record.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from benchmarks.baselines.literal import LITERAL
from benchmarks.harness import command
from benchmarks.harness.recipes import OURS, Recipe
from benchmarks.report import record
from soflow_fast.config.presets import preset
from soflow_fast.config.schema import Config
from soflow_fast.data import open_source
from soflow_fast.evaluation import measure_digits
from soflow_fast.flow import per_sample
from soflow_fast.objective import ConsistencyPoints
from soflow_fast.training.consistency_target import ConsistencyTarget, value_and_increment
from soflow_fast.training.state import TrainState, filled_flow

ERROR_R = (0.1, 0.01, 0.002, 0.0003)
WAYS = {
    "bf16 pair": ConsistencyTarget("pair", "bf16", "student"),
    "fp16 pair": ConsistencyTarget("pair", "fp16", "student"),
    "float32 pair": ConsistencyTarget("pair", "fp32", "student"),
    "bf16 increments": ConsistencyTarget("increments", "bf16", "student"),
    "float32 increments": ConsistencyTarget("increments", "fp32", "student"),
}
SAMPLES = 4000


class Training(NamedTuple):
    """One way to train."""

    precision: str
    """The precision of the step."""
    target: ConsistencyTarget
    decay: float = 0.0
    """The decay of the teacher, where there is one."""
    recipe: Recipe = OURS


RECIPES = {
    "float32": Training("fp32", WAYS["float32 pair"]),
    "bf16, bf16 pair": Training("bf16", WAYS["bf16 pair"]),
    "bf16, fp16 pair": Training("bf16", WAYS["fp16 pair"]),
    "bf16, increments": Training("bf16", WAYS["bf16 increments"]),
    "bf16, increments, EMA teacher 0.9": Training("bf16", ConsistencyTarget("increments", "bf16", "ema"), 0.9),
    "bf16, increments, EMA teacher 0.99": Training("bf16", ConsistencyTarget("increments", "bf16", "ema"), 0.99),
    "bf16, increments, EMA teacher 0.999": Training("bf16", ConsistencyTarget("increments", "bf16", "ema"), 0.999),
    "float32, literal EMA 0.99": Training("fp32", ConsistencyTarget("pair", "fp32", "ema"), 0.99, LITERAL),
}


def configuration(seed: int, r_end: float, steps: int, precision: str = "fp32", **changes: object) -> Config:
    """The digits preset with its r going down to `r_end`."""
    fields = {"objective.r_end": r_end, "run.check_quotient_every": 0, **changes}
    return preset("digits", seed=seed, steps=steps, precision=precision, device="cpu", **fields)


def train(
    config: Config, target: ConsistencyTarget | None = None, recipe: Recipe = OURS
) -> tuple[TrainState, dict[str, float]]:
    """Train to the last step. Returns the state and the mean of the last 100 steps' metrics.

    target: taken in place of the one of the configuration, as float16 is refused on processors that lack it, where
    torch computes it all the same.
    """
    state = recipe.build(config)
    state.target = target or state.target
    source = open_source(config)
    sums: dict[str, float] = {}
    last = min(100, config.steps)
    while state.step < config.steps:
        metrics = recipe.step(state, *source.batch(state.step))
        if state.step > config.steps - last:
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + float(value) / last
    return state, sums


def errors(seed: int, steps: int, samples: int = 256) -> list[dict]:
    """Relative error of q and its cosine with float64, for every way and r."""
    torch.set_num_threads(1)
    state, _ = train(configuration(seed, 0.002, steps))
    flow, objective = state.flow, state.objective
    wide = filled_flow(state.config, {name: value.double() for name, value in state.weights().items()})
    source = torch.Generator().manual_seed(seed)
    x0, y = (
        torch.cat(parts)[:samples]
        for parts in zip(*map(open_source(state.config).batch, range(-(-samples // 64))), strict=True)
    )
    x1 = torch.randn(x0.shape, generator=source)
    t, s = objective.consistency_times(samples, source)
    rows = []
    for r in ERROR_R:
        l = t + r * (s - t)
        x, v = flow.point(x0, x1, t)
        at = ConsistencyPoints(x, v, v * per_sample(l - t, x), x + v * per_sample(l - t, x), t, l, s, y)
        doubles = [value.double() for value in (x, at.dx, t, l, s)]
        with torch.no_grad():
            start = wide.network(doubles[0], doubles[2], doubles[4], y)
            end = wide.network(doubles[0] + doubles[1], doubles[3], doubles[4], y)
            points = ConsistencyPoints._make([*(value.double() for value in at[:7]), *at[7:]])
            exact = objective.quotient(wide, points, start, end - start)
        for name, way in WAYS.items():
            given = value_and_increment(way, flow, None, at, None)
            q = objective.quotient(flow, at, *given).double()
            error = ((q - exact).norm() / exact.norm()).item()
            cosine = torch.nn.functional.cosine_similarity(q.flatten(), exact.flatten(), dim=0).item()
            rows.append({"kind": "error", "r": r, "way": name, "error": error, "cosine": cosine})
    return rows


def quality(name: str, r_end: float, seed: int, steps: int) -> dict:
    """Train one recipe and judge its samples."""
    torch.set_num_threads(1)
    training = RECIPES[name]
    config = configuration(seed, r_end, steps, training.precision)
    teacher = training.target.teacher
    if teacher != "student":
        objective = replace(config.objective, teacher=teacher, teacher_decay=training.decay)
        config = replace(config, objective=objective)
    began = time.monotonic()
    try:
        state, metrics = train(config, training.target, training.recipe)
        figures = {nfe: measure_digits(state.ema, SAMPLES, nfe, seed=0)._asdict() for nfe in (1, 2)}
    except ValueError as error:  # samples that are not finite have no distance to anything
        metrics, figures = {"failed": str(error)}, {}
    seconds = time.monotonic() - began
    row = {"kind": "quality", "recipe": name, "r_end": r_end, "seed": seed, "seconds": seconds}
    return row | {"last": metrics, "nfe": figures}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = command.Parser(prog="python -m benchmarks.precision", description=__doc__)
    parser.add_argument("--seeds", type=command.seed, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--steps", type=command.count, default=1500, metavar="N", help="updates of each run (1500)")
    parser.add_argument("--r-end", type=command.fraction, nargs="+", default=[0.002, 0.0003], metavar="R")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES), metavar="NAME")
    command.add_workers(parser)
    options = parser.parse(argv)
    for name in ("seeds", "r_end", "recipes"):
        command.distinct(f"--{name.replace('_', '-')}", getattr(options, name))
    kept = record.Growing("precision", argv)
    jobs = [(name, r, seed) for seed in options.seeds for r in options.r_end for name in options.recipes]
    with command.workers(options.workers) as pool:
        table = pool.submit(errors, options.seeds[0], options.steps)
        runs = [pool.submit(quality, *job, options.steps) for job in jobs]
        rows = list(table.result())
        for run in runs:
            row = run.result()
            rows.append(row)
            print({k: row[k] for k in ("recipe", "r_end", "seed", "seconds")}, row["nfe"].get(1), flush=True)
            kept.keep(rows)
    kept.finish(rows)
