"""`python -m benchmarks.quality_for_time`: what SoFlow and MeanFlow make of the same seconds, as a record.

On the digits, on the CPU, in float32: the same network, batches, optimiser, guidance and seeds. Every so many steps the
clock stops and one-step samples of the averaged weights are judged. MeanFlow is the fastest right one that we have,
with du/dt only where r != t: by a finite difference, whose float32 du/dt is off by less than 0.1 % and whose step took
43 ms here where tangents beside the student's values took 45 and torch.func.jvp 59 (medians of 40, in turn in one run,
one thread; compiled, neither was faster). Once with its published times, 75 % of them with r = t, and once with the
times that the preset found for SoFlow. Runs go side by side, one thread each. `python -m benchmarks.report` makes the
table and the plot.
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import time

import torch

from benchmarks import record
from benchmarks.baselines import meanflow
from benchmarks.contestants import DIFFERENCE, on_a_quarter
from benchmarks.recipes import OURS, Recipe
from soflow_fast.config import Config
from soflow_fast.data import open_source
from soflow_fast.evaluation import measure_digits
from soflow_fast.presets import preset

SAMPLES = 4000
METHODS: dict[str, Recipe] = {
    "SoFlow": OURS,
    "MeanFlow, published times": DIFFERENCE,
    "MeanFlow, SoFlow's times": on_a_quarter(
        "MeanFlow", meanflow.by_difference, None, taped=False, settings=meanflow.Settings(time=None)
    ),
}


def configuration(seed: int, steps: int) -> Config:
    """The digits preset without what the engine measures on the way."""
    return preset("digits", seed=seed, steps=steps, precision="fp32", device="cpu", **{"run.check_quotient_every": 0})


def run(method: str, seed: int, steps: int, every: int) -> dict:
    """Train once; the figures of one-step samples after every `every` steps, and the seconds of training until then."""
    torch.set_num_threads(1)
    recipe, config = METHODS[method], configuration(seed, steps)
    state, source = recipe.build(config), open_source(config)
    points, seconds = [], 0.0
    while state.step < steps:
        began = time.perf_counter()
        for _ in range(min(every, steps - state.step)):
            recipe.step(state, *source.batch(state.step))
        seconds += time.perf_counter() - began
        scores = measure_digits(state.ema, SAMPLES, 1, seed=0)
        points.append({"step": state.step, "seconds": seconds, **scores._asdict()})
    return {"method": method, "seed": seed, "points": points}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality_for_time", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--steps", type=int, default=2000, help="updates of each run (2000)")
    parser.add_argument("--every", type=int, default=0, help="updates between two points (an eighth of the steps)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    options = parser.parse_args()
    if options.steps < 1 or options.every < 0 or options.workers < 1:
        parser.error("--steps, --every and --workers must be positive")
    every = options.every or max(1, options.steps // 8)
    # Seed by seed, so that runs that are compared go at about the same time.
    jobs = [(method, seed) for seed in options.seeds for method in METHODS]
    rows = []
    with concurrent.futures.ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
        pending = [pool.submit(run, method, seed, options.steps, every) for method, seed in jobs]
        for result in map(concurrent.futures.Future.result, pending):
            rows.append(result)
            last = result["points"][-1]
            print(
                f"{result['method']}, seed {result['seed']}: {last['seconds']:.0f} s, {last['frechet']:.1f}", flush=True
            )
    seeds = " ".join(map(str, options.seeds))
    command = f"python -m benchmarks.quality_for_time --seeds {seeds} --steps {options.steps}"
    path = record.write(rows, command, benchmark="quality-for-time")
    print(f"recorded: {path.relative_to(record.ROOT)}")


if __name__ == "__main__":
    main()
