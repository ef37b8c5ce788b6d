"""`python -m benchmarks.equal_work --data PATH`: SoFlow, MeanFlow, flow matching after the same FLOPs of training.

On the digits, and with --data, a folder or zip of photographs of 10 classes, on those at 32 x 32 pixels. All methods
have the same network, initial weights, data, batch, optimiser and average of the weights; each has the learning rate
that was best for it among three, on a seed of its own and a third of the work. The work is the FLOPs of a step, those
of matrix products and attention in forward, backward and forward-mode derivative as torch's counter finds them, times
the steps: SoFlow takes --steps or --photograph-steps, the others as many as make the same work, and every schedule
ends with its own last step.

"MeanFlow" is the engine's, whose derivative is a difference where r != t. "MeanFlow as published" is torch.func.jvp
over the whole batch, on the digits alone, as it is the slowest by far. On the digits the methods are compared once more
after equal steps. Seconds are those of the process on the CPU, as the machine may be shared.
`python -m benchmarks.report` makes the tables.
"""

import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed

import torch

from benchmarks.harness import account, command
from benchmarks.harness.contestants import MEANFLOW
from benchmarks.harness.recipes import Recipe
from benchmarks.report import record
from benchmarks.studies import quality_for_time
from benchmarks.studies.equal_work_problems import CIFAR, DIGITS, Problem, floor
from soflow_fast.errors import Diverged, UserError
from soflow_fast.sampling.solving import usual_calls

PROBLEMS: dict[str, Problem] = {"digits": DIGITS, "photographs": CIFAR}
METHODS: dict[str, Recipe] = {
    "SoFlow": quality_for_time.METHODS["SoFlow"],
    "MeanFlow": quality_for_time.METHODS["MeanFlow of the engine"],
    "MeanFlow as published": MEANFLOW,
    "flow matching": quality_for_time.METHODS["flow matching, 10 Euler steps"],
}
POINTS = 3
"""At which samples are judged during training, evenly spaced."""
ONE_STEP, EULER = (1, 2), (1, 2, 4, 10, 25)
"""Network calls of the samples that are judged at the end, of one-step methods and of flow matching."""
TUNING_SEED = 1000
"""The seed on which learning rates are chosen, none of those that are compared."""


def of_problem(name: str) -> list[str]:
    """The methods that are compared on a problem."""
    return [method for method in METHODS if name == "digits" or METHODS[method] is not MEANFLOW]


def costs(name: str, method: str, path: str) -> dict[str, int]:
    """The FLOPs of one step, counted in a real one, its images, and the FLOPs of one network call of a sample."""
    torch.set_num_threads(1)
    problem, recipe = PROBLEMS[name], METHODS[method]
    config = problem.configure(0, 10, problem.rates[0], path)
    state = recipe.build(config)
    x, y = problem.open(config).batch(0)
    found = {"flops_per_call": account.forward_flops(state, x[:1])}
    found["flops_per_step"] = account.flops(lambda: recipe.step(state, x, y))
    return found | {"batch": len(x)}


def train(name: str, method: str, seed: int, steps: int, rate: float, path: str, kind: str) -> dict:
    """Train once and judge the averaged weights: at POINTS points by the usual number of calls, at the end by others
    as well. kind: "work", "steps" or "rate", what the run is for; but for the first, the end alone is judged. Where
    samples are no longer finite, the row says "diverged" and has the points before that."""
    torch.set_num_threads(1)
    problem, recipe = PROBLEMS[name], METHODS[method]
    config = problem.configure(seed, steps, rate, path)
    state, source = recipe.build(config), problem.open(config)
    calls, parts = usual_calls(state.ema), POINTS if kind == "work" else 1
    row: dict = {"kind": kind, "problem": name, "method": method, "seed": seed, "lr": rate, "steps": steps}
    row |= {"nfe": calls, "points": [], "samples": {}}
    stops, scores = sorted({max(1, steps * (k + 1) // parts) for k in range(parts)}), {}
    try:
        for seconds in quality_for_time.trained(recipe, state, source, stops, time.process_time):
            scores = problem.judge(state.ema, calls, path)
            row["points"].append({"step": state.step, "cpu_seconds": seconds, **scores})
        if kind == "work":
            others = ONE_STEP if state.ema.solves else EULER
            judged = {nfe: scores if nfe == calls else problem.judge(state.ema, nfe, path) for nfe in others}
            row["samples"] = {str(nfe): found for nfe, found in judged.items()}
    except Diverged:
        row["diverged"] = True
    return row


def best_rates(rows: list[dict]) -> dict[tuple[str, str], float]:
    """The learning rate by (problem, method) whose samples are nearest to the data, of rows of kind "rate"."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        if row["kind"] == "rate" and "diverged" not in row:
            distance = row["points"][-1][PROBLEMS[row["problem"]].figure]
            found.setdefault((row["problem"], row["method"]), []).append((distance, row["lr"]))
    return {at: min(tried)[1] for at, tried in found.items()}


def said(row: dict) -> str:
    """A line on a row of `train`."""
    about = f"{row['kind']}, {row['problem']}, {row['method']}, seed {row['seed']}, rate {row['lr']:g}"
    if "diverged" in row:
        return f"{about}: diverged"
    last = row["points"][-1]
    return f"{about}: {last['cpu_seconds']:.0f} s, {last[PROBLEMS[row['problem']].figure]:.2f}"


def steps_of(cost: dict[tuple[str, str], dict], name: str, method: str, steps: int) -> int:
    """The steps of a method whose work is that of so many steps of SoFlow, to the nearest, at least one."""
    return max(1, round(steps * cost[name, "SoFlow"]["flops_per_step"] / cost[name, method]["flops_per_step"]))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = command.Parser(prog="python -m benchmarks.equal_work", description=__doc__)
    parser.add_argument(
        "--data", default="", metavar="PATH", help="photographs by class, CLASS/NAME; none: digits alone"
    )
    parser.add_argument("--seeds", type=command.seed, nargs="+", default=[0, 1, 2], metavar="N")
    about = "seeds of the photographs (the first two of --seeds)"
    parser.add_argument("--photograph-seeds", type=command.seed, nargs="+", metavar="N", help=about)
    parser.add_argument("--steps", type=command.count, default=1000, metavar="N", help="of SoFlow on the digits (1000)")
    about = "of SoFlow on the photographs (2000)"
    parser.add_argument("--photograph-steps", type=command.count, metavar="N", help=about)
    command.add_workers(parser)
    options = parser.parse(argv)
    seeds = {"digits": options.seeds, "photographs": options.photograph_seeds or options.seeds[:2]}
    for flag, values in (("--seeds", options.seeds), ("--photograph-seeds", seeds["photographs"])):
        command.distinct(flag, values)
        if TUNING_SEED in values:
            raise UserError(f"{flag}: {TUNING_SEED} is the seed on which learning rates are chosen")
    if not options.data and (options.photograph_seeds or options.photograph_steps):
        raise UserError("--photograph-steps, --photograph-seeds: there are no photographs without --data")
    steps = {"digits": options.steps} | ({"photographs": options.photograph_steps or 2000} if options.data else {})
    path = options.data
    kept = record.Growing("equal-work", argv)
    cost = {(name, method): costs(name, method, path) for name in steps for method in of_problem(name)}
    rows: list[dict] = [{"kind": "cost", "problem": at[0], "method": at[1], **found} for at, found in cost.items()]
    if path:
        rows.append({"kind": "floor", "problem": "photographs", **floor(path)})
    search = [
        (name, method, TUNING_SEED, steps_of(cost, name, method, -(-steps[name] // 3)), rate, path, "rate")
        for name in steps
        for method in of_problem(name)
        for rate in PROBLEMS[name].rates
    ]
    unknown = {(name, method): math.nan for name in steps for method in of_problem(name)}
    with command.workers(options.workers) as pool:

        def run_all(jobs: list[tuple], later: list[tuple]) -> None:
            """Run jobs, arguments of `train`, and keep each row as it comes; what is missing, `later` too, by name."""
            pending = {pool.submit(train, *job): job for job in jobs}
            kept.keep(rows, [called(*job) for job in (*jobs, *later)])
            for training in as_completed(pending):
                rows.append(row := training.result())
                del pending[training]
                kept.keep(rows, [called(*job) for job in (*pending.values(), *later)])
                print(said(row), flush=True)

        run_all(search, list(compared(cost, steps, seeds, unknown, path)))
        run_all(list(compared(cost, steps, seeds, best_rates(rows), path)), [])
    kept.finish(rows)


def called(name: str, method: str, seed: int, steps: int, rate: float, path: str, kind: str) -> str:
    """What a training is called, by its arguments of `train`, while it is missing. A rate that is compared is not known
    before the search for it has ended."""
    return f"{kind} {name} {method} {seed}" + f", lr {rate:g}" * (kind == "rate")


def compared(
    cost: dict[tuple[str, str], dict],
    steps: dict[str, int],
    seeds: dict[str, list[int]],
    rates: dict[tuple[str, str], float],
    path: str,
) -> Iterator[tuple]:
    """The arguments of `train` of all runs that are compared, seed by seed, those after equal steps last."""
    most = max(len(seeds[name]) for name in steps)
    for k in range(most):
        for name in steps:
            for seed in seeds[name][k : k + 1]:
                for method in _with_rate(name, rates):
                    count = steps_of(cost, name, method, steps[name])
                    yield name, method, seed, count, rates[name, method], path, "work"
    for seed in seeds["digits"]:
        for method in _with_rate("digits", rates):
            if steps_of(cost, "digits", method, steps["digits"]) != steps["digits"]:
                yield "digits", method, seed, steps["digits"], rates["digits", method], path, "steps"


def _with_rate(name: str, rates: dict[tuple[str, str], float]) -> list[str]:
    """The methods of a problem that did not diverge at every rate; of the others there is nothing to compare."""
    return [method for method in of_problem(name) if (name, method) in rates]
