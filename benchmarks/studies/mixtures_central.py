"""`python -m benchmarks.mixtures_central`: long trainings by a central difference on the mixtures, as a record.

The look-ahead's levels off at the bias of its fixed point (`benchmarks.mixtures`), as it goes along a random velocity.
Of a central difference the average over that has no term of the first order in the distance of its ends. At the same
constant r, rate and steps it should go below, and this is whether it does.
"""

from collections.abc import Sequence

from benchmarks.harness import command
from benchmarks.report import record
from benchmarks.studies.mixtures.problems import RING, SCATTERED
from benchmarks.studies.mixtures.trainings import long

R = 0.1


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = command.Parser(prog="python -m benchmarks.mixtures_central", description=__doc__)
    parser.add_argument("--seeds", type=command.seed, nargs="+", default=[0, 1], metavar="N")
    parser.add_argument("--steps", type=command.count, default=6000, metavar="N", help="updates of each run (6000)")
    command.add_workers(parser)
    options = parser.parse(argv)
    command.distinct("--seeds", options.seeds)
    kept, rows = record.Growing("mixtures-central", argv), []
    every = max(1, options.steps // 16)
    with command.workers(options.workers) as pool:
        running = {
            pool.submit(long, problem, R, seed, options.steps, every, central=True): f"{problem}, seed {seed}"
            for seed in options.seeds
            for problem in (RING, SCATTERED)
        }
        for training in [*running]:
            rows += training.result()
            del running[training]
            kept.keep(rows, [*running.values()])
            last = rows[-1]["points"][-1]
            print(f"{rows[-1]['problem']}: {last['one_step']:.3f} after {last['cpu_seconds']:.0f} s", flush=True)
    kept.finish(rows)
