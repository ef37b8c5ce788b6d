"""`python -m benchmarks.tokens`: more tokens at equal work, against an exact solution, as a record.

Images of 32 x 32 pixels from a mixture of Gaussians (`benchmarks.exact.images`), whose velocity and one-step solution
f(x_1, 1, 0) are known. The same DiT sees them in patches of 4, 2 and 1 pixels: 64, 256 and 1024 tokens. Every run gets
the same FLOPs of training, those of products and attention in whole steps (`benchmarks.harness.account.flops`, torch's
formulas), which leaves more tokens less of something else: steps, images in a batch, or width. On the way, and at the
end, the averaged weights are held against the exact solution of noises that were never trained on, and the exact
velocity, over all and by band of frequencies. Each way is first tried with every learning rate on a seed of its own,
and then compared at the better one. SoFlow without guidance or labels, constant rate, float32, one CPU thread a run.
`python -m benchmarks.report` makes the table.
"""

import functools
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.exact.images import bands, one_gaussian, photographs, to_coefficients, to_images
from benchmarks.harness import account, command
from benchmarks.report import record
from soflow_fast.config.presets import preset
from soflow_fast.config.schema import Config, DiTConfig
from soflow_fast.errors import UserError
from soflow_fast.flow import SolutionFlow
from soflow_fast.rng import generator
from soflow_fast.training.state import TrainState
from soflow_fast.training.step import train_step

SIDE = 32
DEPTH = 2
BATCH = 64
HELD = 64
"""Noises, and points for the velocity, that the errors are taken on."""
SOLVER_STEPS = 128
"""Runge-Kutta steps of the exact solution; the record says how far twice as many are from them."""
TUNING_SEED = 1000
"""The seed on which learning rates are chosen. It has no part in the comparison."""
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""The parts of the work after which errors are taken."""


class Way(NamedTuple):
    """One way to spend the work."""

    name: str
    patch: int
    hidden: int
    batch: int


WAYS = (
    Way("base", 4, 64, BATCH),
    Way("fewer steps", 2, 64, BATCH),
    Way("fewer steps", 1, 64, BATCH),
    Way("smaller batch", 2, 64, 12),
    Way("smaller batch", 1, 64, 2),
    Way("width", 4, 160, BATCH),
    Way("width", 1, 12, BATCH),
)
"""A smaller batch has about the steps of the base; the two of another width have about the FLOPs of an image, and so
the steps, of 256 tokens at width 64."""


class Held(NamedTuple):
    """What networks are held against; coefficients float64 [HELD, SIDE^2]."""

    noise: Tensor
    solution: Tensor
    """f(noise, 1, 0)."""
    x: Tensor
    """Points x_t on the path, whose times t [HELD] are spread evenly over (0, 1)."""
    t: Tensor
    velocity: Tensor


def tokens_of(way: Way, side: int = SIDE) -> int:
    """Tokens of an image."""
    return (side // way.patch) ** 2


@functools.cache
def held(side: int = SIDE) -> Held:
    """The exact solution and velocity at points that no run trains on."""
    mixture, source = photographs(side), generator(0, 0, 0, "held")
    noise = torch.randn(HELD, side**2, generator=source, dtype=torch.float64)
    ones = torch.ones(HELD, dtype=torch.float64)
    t = (torch.arange(HELD, dtype=torch.float64) + 0.5) / HELD
    x0, _ = mixture.sample(HELD, source)
    x = (1 - t[:, None]) * x0 + t[:, None] * torch.randn(x0.shape, generator=source, dtype=torch.float64)
    return Held(noise, mixture.solution(noise, ones, 0 * ones, steps=SOLVER_STEPS), x, t, mixture.velocity(x, t))


def relative(found: Tensor, exact: Tensor, side: int) -> list[float]:
    """|found - exact| / |exact| over all coefficients, then over each band, coarse to fine."""
    everything = torch.ones(side**2, dtype=torch.bool)
    return [float((found - exact)[:, band].norm() / exact[:, band].norm()) for band in (everything, *bands(side))]


@torch.no_grad()
def errors(flow: SolutionFlow, side: int = SIDE) -> dict[str, list[float]]:
    """The relative errors of f(x_1, 1, 0) and of the velocity of an unconditional flow."""
    at, ones = held(side), torch.ones(HELD)
    noise, x = (to_images(z, side).float() for z in (at.noise, at.x))
    pairs = zip(*(value.split(16) for value in (noise, ones, x, at.t.float())), strict=True)
    found = [(flow.solution(n, one, 0 * one), flow.velocity(y, t)) for n, one, y, t in pairs]
    solution, velocity = (to_coefficients(torch.cat(parts).double()) for parts in zip(*found, strict=True))
    return {"solution": relative(solution, at.solution, side), "velocity": relative(velocity, at.velocity, side)}


def references(side: int = SIDE) -> list[dict]:
    """The errors of two that are not trained, the data's mean and the exact flow of one Gaussian, and the solver's."""
    at, mixture = held(side), photographs(side)
    single, ones = one_gaussian(mixture), torch.ones(HELD, dtype=torch.float64)
    solution = single.solution(at.noise, ones, 0 * ones, steps=SOLVER_STEPS)
    rows = [
        {"name": "the data's mean", "solution": relative(single.means.expand_as(at.noise), at.solution, side)},
        {
            "name": "exact for one Gaussian",
            "solution": relative(solution, at.solution, side),
            "velocity": relative(single.velocity(at.x, at.t), at.velocity, side),
        },
        {"name": "twice the solver's steps"},
    ]
    error = mixture.solution_error(at.noise[:4], ones[:4], 0 * ones[:4], steps=SOLVER_STEPS)
    rows[2]["error"] = error / float(at.solution.norm(dim=1).mean())
    return [{"kind": "reference", **row} for row in rows]


def configuration(way: Way, seed: int, lr: float, steps: int, side: int = SIDE) -> Config:
    """SoFlow by the digits preset's times, without labels or guidance."""
    fields = {"objective.guidance_scale": 1.0, "objective.label_drop": 0.0, "run.check_quotient_every": 0}
    fields |= {"optim.lr": lr, "optim.lr_schedule": "constant", "optim.ema_decay": 0.99, "optim.ema_warmup": True}
    base = preset("digits", seed=seed, steps=steps, batch_size=way.batch, precision="fp32", device="cpu", **fields)
    heads = max(1, way.hidden // 32)
    model = DiTConfig(side, way.patch, 1, way.hidden, DEPTH, heads, num_classes=0)
    return replace(base, model=model)


def step_flops(way: Way, side: int = SIDE) -> int:
    """FLOPs of one step."""
    state = TrainState.build(configuration(way, 0, 1e-3, 1, side))
    return account.flops(lambda: train_step(state, torch.randn(way.batch, 1, side, side), None))


def run(way: Way, seed: int, lr: float, work: float, side: int = SIDE) -> dict:
    """Train once with `work` FLOPs, to the nearest step; the errors after each of SHARES of it."""
    torch.set_num_threads(1)
    each = step_flops(way, side)
    steps = max(1, round(work / each))
    state, mixture = TrainState.build(configuration(way, seed, lr, steps, side)), photographs(side)
    points, seconds = [], 0.0
    for end in sorted({max(1, round(share * steps)) for share in SHARES}):
        began = time.process_time()
        while state.step < end:
            z, _ = mixture.sample(way.batch, generator(seed, state.step, 0, "data"))
            train_step(state, to_images(z, side).float(), None)
        seconds += time.process_time() - began
        points.append({"step": end, "flops": end * each, "cpu_seconds": seconds, **errors(state.ema, side)})
    facts = {"kind": "run", **way._asdict(), "tokens": tokens_of(way, side), "seed": seed, "lr": lr}
    facts |= {"parameters": state.parameter_count(), "step_flops": each, "steps": steps}
    return facts | {"points": points}


def chosen(rows: Sequence[dict]) -> dict[tuple[str, int], float]:
    """The learning rate by (way, tokens) whose error of the solution is least, of rows of kind "rate". One whose error
    is no number loses against every other."""
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for row in rows:
        if row["kind"] == "rate":
            error = row["points"][-1]["solution"][0]
            error = math.inf if math.isnan(error) else error
            found.setdefault((row["name"], row["tokens"]), []).append((error, row["lr"]))
    return {at: min(tried)[1] for at, tried in found.items()}


def said(row: dict) -> str:
    """A line on a row of `run`."""
    last = row["points"][-1]
    about = f"{row['tokens']} tokens, {row['name']}, lr {row['lr']:g}, seed {row['seed']}: {row['steps']} steps"
    found = f"f {last['solution'][0]:.3f}, v {last['velocity'][0]:.3f}"
    return f"{about}, {last['cpu_seconds']:.0f} CPU-seconds, {found}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = command.Parser(prog="python -m benchmarks.tokens", description=__doc__)
    parser.add_argument("--seeds", type=command.seed, nargs="+", default=[0, 1, 2], metavar="N")
    about = "GFLOP of training of each run (1500)"
    parser.add_argument("--gflop", type=command.count, default=1500, metavar="N", help=about)
    about = "learning rates that are tried, on a seed of their own (0.001 0.004)"
    parser.add_argument("--rates", type=command.fraction, nargs="+", default=[0.001, 0.004], metavar="LR", help=about)
    command.add_workers(parser)
    options = parser.parse(argv)
    command.distinct("--seeds", options.seeds)
    command.distinct("--rates", options.rates)
    if TUNING_SEED in options.seeds:
        raise UserError(f"--seeds: {TUNING_SEED} is the seed on which learning rates are chosen")
    kept = record.Growing("tokens", argv)
    compared = [f"{way.name}, patches of {way.patch}, seed {seed}" for seed in options.seeds for way in WAYS]
    with command.workers(options.workers) as pool:
        rows = list(pool.submit(references).result())

        def run_all(kind: str, jobs: list[tuple[Way, int, float]], later: list[str]) -> None:
            """Run jobs and keep each row as it comes, under that kind; `later` has not begun yet."""
            pending = {pool.submit(run, *job, options.gflop * 1e9): job for job in jobs}
            for training in [*pending]:
                rows.append(row := training.result() | {"kind": kind})
                del pending[training]
                left = [f"{way.name}, patches of {way.patch}, seed {s}, lr {lr:g}" for way, s, lr in pending.values()]
                kept.keep(rows, left + later)
                print(f"{kind}: {said(row)}", flush=True)

        run_all("rate", [(way, TUNING_SEED, lr) for way in WAYS for lr in options.rates], compared)
        rates = chosen(rows)
        run_all("run", [(way, seed, rates[way.name, tokens_of(way)]) for seed in options.seeds for way in WAYS], [])
    kept.finish(rows)
