"""`python -m benchmarks.precision`: what rounding does to the consistency quotient and to what is learned, as a record.

Errors: a small DiT is trained on the digits from a seed, in float32; then the quotient of 256 samples is taken in every
way and held against float64, at several r. Quality: the digits are trained in every way, seed by seed, and judged.
`python -m benchmarks.report` makes the tables and the plot of docs/precision.md from the record.
"""

import copy
import os
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from benchmarks import command, record
from soflow_fast.commands import process
from soflow_fast.commands.parser import Parser
from soflow_fast.config.presets import preset
from soflow_fast.config.schema import Config
from soflow_fast.data import open_source
from soflow_fast.evaluation import measure_digits
from soflow_fast.flow import per_sample
from soflow_fast.training.consistency_target import Ends, Quotient, value_and_increment
from soflow_fast.training.state import TrainState
from soflow_fast.training.step import train_step

ERROR_R = (0.1, 0.01, 0.002, 0.0003)
WAYS = {
    "bf16 pair": Quotient("pair", "bf16", "student"),
    "fp16 pair": Quotient("pair", "fp16", "student"),
    "float32 pair": Quotient("pair", "fp32", "student"),
    "bf16 increments": Quotient("increments", "bf16", "student"),
    "float32 increments": Quotient("increments", "fp32", "student"),
}
SAMPLES = 4000

# name: precision of the step, how the quotient is taken, decay of the teacher
RECIPES: dict[str, tuple[str, Quotient, float]] = {
    "float32": ("fp32", Quotient("pair", "fp32", "student"), 0.0),
    "bf16, bf16 pair": ("bf16", Quotient("pair", "bf16", "student"), 0.0),
    "bf16, fp16 pair": ("bf16", Quotient("pair", "fp16", "student"), 0.0),
    "bf16, increments": ("bf16", Quotient("increments", "bf16", "student"), 0.0),
    "bf16, increments, EMA teacher 0.9": ("bf16", Quotient("increments", "bf16", "ema"), 0.9),
    "bf16, increments, EMA teacher 0.99": ("bf16", Quotient("increments", "bf16", "ema"), 0.99),
    "bf16, increments, EMA teacher 0.999": ("bf16", Quotient("increments", "bf16", "ema"), 0.999),
    "float32, literal EMA 0.99": ("fp32", Quotient("pair", "fp32", "ema-literal"), 0.99),
}


def configuration(seed: int, r_end: float, steps: int, precision: str = "fp32", **changes: object) -> Config:
    """The digits preset with its r going down to `r_end`."""
    fields = {"objective.r_end": r_end, "run.check_quotient_every": 0, **changes}
    return preset("digits", seed=seed, steps=steps, precision=precision, device="cpu", **fields)


def train(config: Config, quotient: Quotient | None = None) -> tuple[TrainState, dict[str, float]]:
    """Train to the last step. Returns the state and the mean of the last 100 steps' metrics.

    quotient: taken in place of the one of the configuration, as float16 is refused on processors that lack it, where
    torch computes it all the same.
    """
    state = TrainState.build(config)
    state.quotient = quotient or state.quotient
    source = open_source(config)
    sums: dict[str, float] = {}
    last = min(100, config.steps)
    while state.step < config.steps:
        metrics = train_step(state, *source.batch(state.step))
        if state.step > config.steps - last:
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + float(value) / last
    return state, sums


def errors(seed: int, steps: int, samples: int = 256) -> list[dict]:
    """Relative error of q and its cosine with float64, for every way and r."""
    torch.set_num_threads(1)
    state, _ = train(configuration(seed, 0.002, steps))
    flow, objective = state.flow, state.objective
    wide = copy.deepcopy(flow).double()
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
        at = Ends(x, v, v * per_sample(l - t, x), x + v * per_sample(l - t, x), t, l, s, y)
        doubles = [value.double() for value in (x, at.dx, t, l, s)]
        with torch.no_grad():
            start = wide.network(doubles[0], doubles[2], doubles[4], y)
            end = wide.network(doubles[0] + doubles[1], doubles[3], doubles[4], y)
            exact = objective.quotient(wide, start, end - start, doubles[0], v.double(), *doubles[2:])
        for name, way in WAYS.items():
            given = value_and_increment(way, flow, None, at, None)
            q = objective.quotient(flow, *given, x, v, t, l, s).double()
            error = ((q - exact).norm() / exact.norm()).item()
            cosine = torch.nn.functional.cosine_similarity(q.flatten(), exact.flatten(), dim=0).item()
            rows.append({"kind": "error", "r": r, "way": name, "error": error, "cosine": cosine})
    return rows


def quality(name: str, r_end: float, seed: int, steps: int) -> dict:
    """Train one recipe and judge its samples."""
    torch.set_num_threads(1)
    precision, quotient, decay = RECIPES[name]
    config = configuration(seed, r_end, steps, precision)
    if quotient.teacher != "student":
        config = replace(config, objective=replace(config.objective, teacher=quotient.teacher, teacher_decay=decay))
    began = time.monotonic()
    try:
        state, metrics = train(config, quotient)
        figures = {nfe: measure_digits(state.ema, SAMPLES, nfe, seed=0)._asdict() for nfe in (1, 2)}
    except ValueError as error:  # samples that are not finite have no distance to anything
        metrics, figures = {"failed": str(error)}, {}
    seconds = time.monotonic() - began
    row = {"kind": "quality", "recipe": name, "r_end": r_end, "seed": seed, "seconds": seconds}
    return row | {"last": metrics, "nfe": figures}


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = Parser(prog="python -m benchmarks.precision", description=__doc__)
    parser.add_argument("--seeds", type=command.seed, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--steps", type=command.count, default=1500, metavar="N", help="updates of each run (1500)")
    parser.add_argument("--r-end", type=command.fraction, nargs="+", default=[0.002, 0.0003], metavar="R")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES), metavar="NAME")
    about = "runs at a time, one thread each"
    parser.add_argument("--workers", type=command.count, default=os.cpu_count() or 1, metavar="N", help=about)
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


if __name__ == "__main__":
    process.run(main)
