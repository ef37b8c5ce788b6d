"""`python -m benchmarks.book`: what the first chapters of docs/ show of a ring of eight Gaussians in the plane.

Trained by the engine, SoFlow and flow matching, on one token of two channels and with p = 0, so that what is learned is
the mean velocity and can be held against the exact flow: samples, trajectories, the map from noise to data, curves.
Computed without training: how far a finite look-ahead moves the solution, and the weights' power p the velocity.

A row for each, `kind` saying which; numbers are rounded, as they are for figures. Points are [x, y] flattened.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.exact.estimates import halves, root_mean_square
from benchmarks.exact.look_ahead import drawn_fixed_point, fixed_point, quotient_bias, weighted_velocity
from benchmarks.exact.mixture import Mixture, ring, scattered
from benchmarks.harness import command
from benchmarks.report import record
from benchmarks.studies.mixtures import problems
from soflow_fast.config.schema import Config, ObjectiveConfig, ObjectiveKind
from soflow_fast.flow import SolutionFlow
from soflow_fast.objective import Objective
from soflow_fast.rng import generator
from soflow_fast.sampling import sample
from soflow_fast.training.state import TrainState
from soflow_fast.training.step import train_step

OBJECTIVES: tuple[ObjectiveKind, ...] = ("soflow", "flow-matching")
WAYS: dict[str, list[tuple[str, dict]]] = {
    "soflow": [("1 call", {"nfe": 1}), ("2 calls", {"nfe": 2})],
    "flow-matching": [(f"{n} Euler step{'s' * (n > 1)}", {"nfe": n}) for n in (1, 2, 10)],
}
"""How the samples of each are drawn."""
RATIOS = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
INTERVALS = ((1.0, 0.5), (1.0, 0.0))
POWERS = (0.0, 0.5, 1.0)


class Size(NamedTuple):
    """How much is computed; the tests take less."""

    shown: int = 300
    """Points kept of each set of samples."""
    judged: int = 4000
    """Samples that distances are of."""
    starts: int = 16
    """Trajectories."""
    times: int = 21
    side: int = 31
    """Points along each side of the map."""
    points: int = 400
    """Points at which the bias is taken."""
    draws: int = 32


def configuration(kind: ObjectiveKind, steps: int, seed: int) -> Config:
    """The training of one objective: that of the study on mixtures, with twice its batch."""
    changes = {"objective__kind": kind, "optim__ema_warmup": False, "batch_size": 256}
    return problems.configuration("ring", seed, steps, **changes)


def images(points: Tensor) -> Tensor:
    """Points [B, 2] as the engine has them, [B, 2, 1, 1] in float32."""
    return points.float()[:, :, None, None]


def rounded(values: Tensor, places: int = 3) -> list:
    """The numbers of a tensor, in its order, as a flat list."""
    return [round(value, places) for value in values.flatten().tolist()]


def train(kind: ObjectiveKind, mixture: Mixture, steps: int, seed: int, size: Size) -> tuple[SolutionFlow, list[dict]]:
    """The averaged flow after so many steps; rows of the losses and of samples on the way."""
    state = TrainState.build(configuration(kind, steps, seed))
    noise = start(size.judged, seed)
    names = ("fm_mse", "sc_mse") if kind == "soflow" else ("fm_mse",)
    curve: dict[str, list] = {name: [] for name in ("step", *names)}
    gathered: list[list[float]] = []
    rows: list[dict] = []
    looked_at = {0, *(round(steps * share) for share in (0.01, 0.03, 0.1, 0.3, 1.0))}
    for step in range(steps + 1):
        if kind == "soflow" and step in looked_at:
            rows.append({"kind": "progress", "objective": kind, "step": step, **drawn(state.ema, noise, {}, size)})
        if step == steps:
            break
        x0, _ = mixture.sample(state.config.batch_size, generator(seed, step, 0, "data"))
        totals = train_step(state, images(x0), None)
        gathered.append([totals[name].item() for name in names])
        if len(gathered) == max(1, steps // 80):
            curve["step"].append(step + 1)
            for name, value in zip(names, rounded(torch.tensor(gathered).mean(0)), strict=True):
                curve[name].append(value)
            gathered.clear()
    rows.append({"kind": "losses", "objective": kind, **curve})
    return state.ema, rows


def start(n: int, seed: int) -> Tensor:
    """Noise [n, 2], float64, the same for every flow."""
    return torch.randn(n, 2, generator=generator(seed, 0, 0, "noise of the book"), dtype=torch.float64)


def drawn(flow: SolutionFlow, noise: Tensor, how: dict, size: Size) -> dict:
    """The samples of a flow from noise [n, 2] that a row keeps, and the share of all that lies on the ring, which is
    within three deviations of a component's mean."""
    mixture = ring()
    calls = how.get("nfe", 1)
    more = [torch.randn(len(noise), 2, generator=generator(1, k, 0, "noise of the book")) for k in range(1, calls)]
    all_noise = [images(x) for x in (noise, *more)] if flow.solves else [images(noise)]
    x = sample(flow, noise=all_noise, **how)[:, :, 0, 0].double()
    near = torch.cdist(x, mixture.means).amin(1) < 3 * mixture.deviations[0, 0]
    found = {"points": rounded(x[: size.shown]), "on_the_ring": round(near.double().mean().item(), 4)}
    if calls == 1 or not flow.solves:  # with new noise on the way there is no one end
        one = torch.ones(len(noise), dtype=torch.float64)
        exact = mixture.solution(noise, one, 0 * one)
        found["distance_to_exact"] = round((x - exact).square().sum(1).mean().sqrt().item(), 4)
    return found


@torch.no_grad()
def shown(flow: SolutionFlow, kind: str, noise: Tensor, size: Size) -> list[dict]:
    """Rows of what a trained flow does: samples, trajectories, the map."""
    rows = [
        {"kind": "samples", "objective": kind, "way": way, **drawn(flow, noise, how, size)} for way, how in WAYS[kind]
    ]
    if not flow.solves:
        return rows
    x, one = images(noise[: size.starts]), torch.ones(size.starts)
    times = torch.linspace(1, 0, size.times)
    along = torch.stack([flow.solution(x, one, s * one)[:, :, 0, 0] for s in times], 1)
    rows.append({"kind": "trajectories", "objective": kind, "times": rounded(times), "points": rounded(along)})
    side = torch.linspace(-2.5, 2.5, size.side)
    grid = torch.cartesian_prod(side, side)
    ones = torch.ones(len(grid))
    ends = flow.solution(images(grid), ones, 0 * ones)
    return [*rows, {"kind": "map", "objective": kind, "side": rounded(side), "points": rounded(ends, 2)}]


def biases(r: float, size: Size, seed: int) -> list[dict]:
    """Rows of the bias at one r: of the solution from noise over each interval, and of the quotient at drawn times."""
    mixture, source = ring(), generator(seed, 0, 0, "bias")
    rows = []
    x = start(size.points, seed)
    for t, s in INTERVALS:
        one = torch.ones(len(x), dtype=torch.float64)
        exact = mixture.solution(x, t * one, s * one, steps=256)
        straight = fixed_point(mixture, x, t, s, r) - exact
        spread = drawn_fixed_point(mixture, x, t, s, r, size.draws, source) - exact
        rows.append({"kind": "solution bias", "r": r, "t": t, "s": s, **summary(straight, spread)})
    places = generator(seed, 0, 0, "points of the bias")  # the same for every r
    t, s = Objective(ObjectiveConfig()).consistency_times(size.points, places, torch.float64)
    x = (1 - t)[:, None] * mixture.sample(size.points, places)[0] + t[:, None] * x
    few = max(2, size.draws // 3)
    q = torch.stack([quotient_bias(mixture, x, t, s, r, 1, source) for _ in range(few)])
    rows.append({"kind": "quotient bias", "r": r, **summary(quotient_bias(mixture, x, t, s, r), q)})
    return rows


def summary(straight: Tensor, draws: Tensor) -> dict:
    """Of biases along mean velocities [B, D] and draws of those along drawn ones [draws, B, D]: the median length over
    points, and the root of the mean square. That of the draws comes from the products of two halves, so that their
    scatter has no part in it; `error` is its standard error."""
    rms, error = root_mean_square(*halves(draws))
    found = {
        "mean_velocity": {"median": straight.norm(dim=1).median(), "rms": root_mean_square(straight)[0]},
        "drawn_velocity": {"median": draws.mean(0).norm(dim=1).median(), "rms": rms, "error": error},
    }
    return {way: {name: float(f"{value:.3g}") for name, value in row.items()} for way, row in found.items()}


def weights(size: Size, seed: int) -> list[dict]:
    """Rows of the velocity that flow matching tends to under the weights of power p, beside the mean one."""
    rows, source = [], generator(seed, 0, 0, "weights")
    for D in (2, 16, 64):
        mixture = scattered(D)
        for time in (0.5, 0.9):
            t = torch.full((size.points,), time, dtype=torch.float64)
            x0, _ = mixture.sample(size.points, source)
            x = (1 - time) * x0 + time * torch.randn(x0.shape, generator=source, dtype=torch.float64)
            exact = mixture.velocity(x, t)
            for p in POWERS:
                found, _ = weighted_velocity(mixture, x, t, p, 0.01, 20 * size.draws, source)
                off = ((found - exact).square().mean() / exact.square().mean()).sqrt().item()
                rows.append({"kind": "weights", "dimensions": D, "t": time, "p": p, "relative": float(f"{off:.3g}")})
    return rows


def main(argv: Sequence[str] | None = None, size: Size | None = None) -> None:
    """Run the command."""
    parser = command.Parser(prog="python -m benchmarks.book", description=__doc__)
    parser.add_argument("--steps", type=command.count, default=8000, metavar="N", help="of each training (8000)")
    parser.add_argument("--seed", type=command.seed, default=0, metavar="N")
    options = parser.parse(argv)
    size = size or Size()
    kept, rows = record.Growing("book", argv), []
    for kind in OBJECTIVES:
        flow, found = train(kind, ring(), options.steps, options.seed, size)
        rows += [row | {"steps": options.steps} for row in found]
        rows += shown(flow, kind, start(size.judged, options.seed), size)
        kept.keep(rows)
        for row in rows:
            if row["kind"] == "samples" and row["objective"] == kind:
                distance = row.get("distance_to_exact", "none")
                print(f"{kind}, {row['way']}: {row['on_the_ring']} on the ring, {distance} from exact", flush=True)
    for r in RATIOS:
        rows += biases(r, size, options.seed)
        kept.keep(rows)
        print(f"r = {r}: {rows[-2]['drawn_velocity']}", flush=True)
    rows += weights(size, options.seed)
    kept.finish(rows)
