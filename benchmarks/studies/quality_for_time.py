"""`python -m benchmarks.quality_for_time`: what SoFlow, MeanFlow, flow matching make of the same seconds, a record.

On the digits, on the CPU, in float32: the same network, batches, optimiser, guidance and seeds. Every so many steps the
clock stops and one-step samples of the averaged weights are judged, of flow matching those of ten Euler steps. MeanFlow
is the engine's (`--objective meanflow`), and, apart from the engine, the fastest right baseline that we have,
with du/dt only where r != t: by a finite difference, whose float32 du/dt is off by less than 0.1 % and whose step took
43 ms here where tangents beside the student's values took 45 and torch.func.jvp 59 (medians of 40, in turn in one run,
one thread; compiled, neither was faster). Once with its published times, 75 % of them with r = t, and once with the
times that the preset found for SoFlow. Runs go side by side, one thread each. `python -m benchmarks.report` makes the
table and the plot.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from benchmarks.baselines import meanflow
from benchmarks.harness import command
from benchmarks.harness.contestants import DIFFERENCE, on_a_quarter
from benchmarks.harness.recipes import OURS, Recipe, ours
from benchmarks.report import record
from soflow_fast.config.presets import preset
from soflow_fast.config.schema import Config
from soflow_fast.data import Source, open_source
from soflow_fast.evaluation import measure_digits
from soflow_fast.sampling.solving import usual_calls
from soflow_fast.training.state import TrainState

SAMPLES = 4000
METHODS: dict[str, Recipe] = {
    "SoFlow": OURS,
    "MeanFlow of the engine": ours("MeanFlow", objective__kind="meanflow", objective__fm_fraction=0.75),
    "flow matching, 10 Euler steps": ours("flow matching", objective__kind="flow-matching"),
    "MeanFlow, published times": DIFFERENCE,
    "MeanFlow, SoFlow's times": on_a_quarter(
        "MeanFlow", meanflow.by_difference, None, taped=False, settings=meanflow.Settings(time=None)
    ),
}


def configuration(seed: int, steps: int) -> Config:
    """The digits preset without what the engine measures on the way."""
    return preset("digits", seed=seed, steps=steps, precision="fp32", device="cpu", **{"run.check_quotient_every": 0})


def run(method: str, seed: int, steps: int, every: int) -> dict:
    """Train once; the figures of samples after every `every` steps, and the seconds of training until then."""
    torch.set_num_threads(1)
    recipe, config = METHODS[method], configuration(seed, steps)
    state, source = recipe.build(config), open_source(config)
    points = []
    for seconds in trained(recipe, state, source, [*range(every, steps, every), steps], time.perf_counter):
        scores = measure_digits(state.ema, SAMPLES, usual_calls(state.ema), seed=0)
        points.append({"step": state.step, "seconds": seconds, **scores._asdict()})
    return {"method": method, "seed": seed, "nfe": usual_calls(state.ema), "points": points}


def trained(
    recipe: Recipe, state: TrainState, source: Source, stops: Iterable[int], clock: Callable[[], float]
) -> Iterator[float]:
    """Train up to each of the steps `stops` in turn; the seconds of training until then, by a clock that stands still
    between them."""
    seconds = 0.0
    for stop in stops:
        began = clock()
        while state.step < stop:
            recipe.step(state, *source.batch(state.step))
        seconds += clock() - began
        yield seconds


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = command.Parser(prog="python -m benchmarks.quality_for_time", description=__doc__)
    parser.add_argument("--seeds", type=command.seed, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--steps", type=command.count, default=2000, metavar="N", help="updates of each run (2000)")
    about = "updates between two points (an eighth of the steps)"
    parser.add_argument("--every", type=command.count, metavar="N", help=about)
    command.add_workers(parser)
    options = parser.parse(argv)
    command.distinct("--seeds", options.seeds)
    kept = record.Growing("quality-for-time", argv)
    every = options.every or max(1, options.steps // 8)
    # Seed by seed, so that runs that are compared go at about the same time.
    jobs = [(method, seed) for seed in options.seeds for method in METHODS]
    rows = []
    with command.workers(options.workers) as pool:
        pending = [pool.submit(run, method, seed, options.steps, every) for method, seed in jobs]
        for training in pending:
            result = training.result()
            rows.append(result)
            kept.keep(rows)
            last = result["points"][-1]
            print(
                f"{result['method']}, seed {result['seed']}: {last['seconds']:.0f} s, {last['frechet']:.1f}", flush=True
            )
    kept.finish(rows)
