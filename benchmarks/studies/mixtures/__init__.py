"""`python -m benchmarks.mixtures`: open questions of the method on data whose velocity and solution are known exactly.

On two mixtures of Gaussians, eight on a ring in the plane and eight in 16 dimensions (`benchmarks.exact.mixture`), the
engine trains a DiT of one token on data drawn afresh in each step. What it has learned is held against the exact
velocity v(x, t) and the exact solution f(x, t, s); what its loss would teach a network without limits is computed
without training (`minimisers`). One factor at a time (`settings`): r and its schedule, the power p of the weights,
lambda, the teacher, the precision of the quotient, a central difference in place of the look-ahead; and long trainings
at a constant r. Times are those of the processor, as wall time would be that of a machine that others share.

`python -m benchmarks.report` makes the tables of docs/open-questions.md from the record.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from typing import Any, NamedTuple

from benchmarks.harness import command
from benchmarks.report import record
from benchmarks.studies.mixtures.minimisers import WIDE, biases, floors, weighted
from benchmarks.studies.mixtures.problems import RING, SCATTERED
from benchmarks.studies.mixtures.settings import SETTINGS
from benchmarks.studies.mixtures.slopes import slopes
from benchmarks.studies.mixtures.trainings import judged, long

LONG_R = (0.1, 0.01, 0.03, 0.002)
LONGER = 4
"""Steps of a long training, in units of the others'."""
LONG_SEEDS = 2
"""Of the seeds, those with long trainings."""


class Job(NamedTuple):
    """Something to measure, and what it is called where it is missing: several may have one name."""

    name: str
    call: Callable[..., list[dict]]
    arguments: tuple[Any, ...]


def jobs(seeds: Sequence[int], steps: int) -> list[Job]:
    """Everything, seed by seed, in the order in which it is to be lost if time runs out."""
    found = [Job(f"bias of {name}", biases, (name,)) for name in (RING, WIDE, SCATTERED)]
    found += [Job("weighted velocities", weighted, ()), Job("floors", floors, ())]
    found += [Job(f"slopes, {name}", slopes, (name, steps)) for name in (RING, SCATTERED)]
    for seed in seeds:
        for problem in (RING, SCATTERED):
            found += [
                Job(f"trainings of seed {seed}", judged, (name, problem, seed, steps))
                for name, one in SETTINGS.items()
                if problem in one.problems
            ]
        if seed in seeds[:LONG_SEEDS]:
            every, whole = max(1, steps // 4), LONGER * steps
            for problem in (SCATTERED, RING):
                found += [Job(f"long, r = {r:g}, {problem}", long, (problem, r, seed, whole, every)) for r in LONG_R]
    return found


def missing(left: Sequence[Job]) -> list[str]:
    """What was not measured, in few words."""
    names = [job.name for job in left]
    return [f"{names.count(name)} {name}" if names.count(name) > 1 else name for name in dict.fromkeys(names)]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = command.Parser(prog="python -m benchmarks.mixtures", description=__doc__)
    parser.add_argument("--seeds", type=command.seed, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--steps", type=command.count, default=1500, metavar="N", help="updates of each run (1500)")
    command.add_workers(parser)
    about = "begin nothing after so many seconds; the record names what is missing"
    parser.add_argument("--within", type=command.seconds, default=command.MOST_SECONDS, metavar="S", help=about)
    options = parser.parse(argv)
    command.distinct("--seeds", options.seeds)
    kept = record.Growing("mixtures", argv)
    waiting, rows, began = jobs(options.seeds, options.steps), [], time.monotonic()
    with command.workers(options.workers) as pool:
        running: dict[Any, Job] = {}
        while running or waiting:
            late = bool(running or rows) and time.monotonic() - began > options.within
            while waiting and not late and len(running) < options.workers:
                job = waiting.pop(0)
                running[pool.submit(job.call, *job.arguments)] = job
            if not running:
                break
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(done)
                rows += done.result()
                print(f"{time.monotonic() - began:.0f} s: {job.name} {job.arguments[:2]}", flush=True)
            kept.keep(rows, missing([*running.values(), *waiting]))
    kept.finish(rows, missing(waiting))
