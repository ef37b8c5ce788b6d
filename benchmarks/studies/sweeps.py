"""`python -m benchmarks.sweeps`: time and memory of a step over batch, tokens and depth, as a record.

Ours against the authors' recipe on one network, of which one number at a time is another. At each point: the check,
the peak memory of each recipe alone, then their steps in turn. Nothing is asserted of the times.
`python -m benchmarks.report` makes the table of docs/performance.md and docs/sweeps.svg from the record.
"""

import ctypes
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.baselines.authors import AUTHORS
from benchmarks.correctness.step import check as check_step
from benchmarks.correctness.step import check_precision
from benchmarks.harness import command
from benchmarks.harness.account import peak_memory
from benchmarks.harness.cases import Case
from benchmarks.harness.recipes import OURS, Recipe, build
from benchmarks.harness.timing import InTurn, release
from benchmarks.report import record
from benchmarks.report.tables import quartiles
from soflow_fast.config.schema import Config, DataConfig, DiTConfig, RunConfig, override

RECIPES = (OURS, AUTHORS)
WARM_UP = 2
MOST_ROUNDS = 50
BESIDE = "out of memory beside the other recipe"
PATCH = 2


class Point(NamedTuple):
    """One network and batch; `axis` is what differs from the network in the middle."""

    axis: str
    value: int
    config: Config


class Sweep(NamedTuple):
    """The network in the middle, and the values of each axis."""

    config: Config
    batch: tuple[int, ...]
    tokens: tuple[int, ...]
    depth: tuple[int, ...]

    def points(self) -> list[Point]:
        """Axis after axis, from small to large."""
        sides = {tokens: PATCH * round(tokens**0.5) for tokens in self.tokens}
        assert all((side // PATCH) ** 2 == tokens for tokens, side in sides.items()), "tokens must be squares"
        fields = {
            "batch": [(n, "batch_size", n) for n in self.batch],
            "tokens": [(n, "model.input_size", side) for n, side in sides.items()],
            "depth": [(n, "model.depth", n) for n in self.depth],
        }
        return [
            Point(axis, value, override(self.config, {name: setting}))
            for axis, values in fields.items()
            for value, name, setting in values
        ]


def network(device: str, batch: int, hidden: int, depth: int, heads: int, side: int) -> Config:
    """A DiT on random latents with the public recipe."""
    model = DiTConfig(
        input_size=side, patch_size=PATCH, in_channels=4, hidden_size=hidden, depth=depth, num_heads=heads
    )
    return Config(
        preset="sweep", model=model, data=DataConfig(kind="latents"), run=RunConfig(device=device), batch_size=batch
    )


def sweep() -> Sweep:
    """The sweep that this machine can time: DiT-B/2 on a GPU, a small DiT on a CPU."""
    if torch.cuda.is_available():
        config = network("cuda", batch=16, hidden=768, depth=12, heads=12, side=32)
        return Sweep(config, (8, 16, 32, 64, 128, 256), (64, 256, 1024, 4096), (6, 12, 24, 48))
    config = network("cpu", batch=8, hidden=192, depth=4, heads=3, side=16)
    return Sweep(config, (4, 8, 16, 32), (16, 64, 256), (2, 4, 8))


def resident_peak() -> Callable[[], int] | None:
    """Starts to watch this process's resident memory; the function returned says how far it rose. None where it cannot
    be watched (Linux can)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier points freed goes back, so that it counts again
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")  # the peak starts anew at what is resident now
        before = _resident("VmRSS")
    except (OSError, AttributeError, StopIteration):
        return None
    return lambda: _resident("VmHWM") - before


def _resident(name: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return 1024 * int(next(line.split()[1] for line in file if line.startswith(name + ":")))


def memory(recipe: Recipe, config: Config) -> tuple[str, int | None]:
    """Precision of the recipe, and the bytes of a training run at its peak, the recipe alone: allocated on a GPU, what
    the process's resident memory rose by on a CPU, None where neither can be read."""
    device = torch.device(config.run.device)
    rose = None if device.type == "cuda" else resident_peak()
    state = build(recipe, config)
    step = partial(recipe.step, state, *Case(config.preset, config).batch(device))
    if device.type == "cuda":
        return state.precision, peak_memory(step, device)[0]
    for _ in range(WARM_UP):
        step()
    return state.precision, None if rose is None else rose()


def blank(point: Point) -> list[dict]:
    """A row a recipe, nothing measured yet."""
    row: dict = {"axis": point.axis, "value": point.value, "case": Case("sweep", point.config).describe()}
    row |= {"precision": point.config.precision, "batch": point.config.batch_size, "peak_bytes": None, "why_not": None}
    return [row | {"recipe": recipe.name, "seconds": []} for recipe in RECIPES]


def measure(point: Point, seconds: float) -> list[dict]:
    """A row a recipe, with the time of every round."""
    config, device = point.config, torch.device(point.config.run.device)
    case = Case("sweep", config)
    rows, timer = blank(point), InTurn(device)
    for recipe, row in zip(RECIPES, rows, strict=True):
        release()  # the one before
        try:
            row["precision"], row["peak_bytes"] = memory(recipe, config)
        except torch.OutOfMemoryError:
            row["why_not"] = "out of memory"
    release()
    for recipe, row in zip(RECIPES, rows, strict=True):
        if row["why_not"] is None:
            try:
                step = partial(recipe.step, build(recipe, config), *case.batch(device))
                for _ in range(WARM_UP):
                    step()
                timer.add(recipe.name, step, row["seconds"])
            except torch.OutOfMemoryError:
                row["why_not"] = BESIDE
    dropped = timer.run(seconds, least=3, most=MOST_ROUNDS)
    for row in rows:
        row["why_not"] = BESIDE if row["recipe"] in dropped else row["why_not"]
    return rows


def check(config: Config) -> None:
    """Check both recipes on a network: raises IncorrectResult."""
    check_step(config, AUTHORS)
    check_precision(config)


def in_order_of_worth(points: list[Point]) -> list[Point]:
    """The first two points of every axis, then the third ones, and so on: what there is when time is up shows all."""
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(point.axis, []).append(point)
    return sorted(points, key=lambda point: max(1, found[point.axis].index(point)))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = command.Parser(prog="python -m benchmarks.sweeps", description=__doc__)
    about = "about how long to time each point (4)"
    parser.add_argument("--seconds", type=command.seconds, default=4.0, help=about)
    about = "begin no point after so many seconds; record those that there are"
    parser.add_argument("--within", type=command.seconds, help=about)
    arguments = parser.parse(argv)
    kept, began = record.Growing("sweeps", argv), time.monotonic()
    points, checked = sweep().points(), set()
    rows: list[dict] = []
    found: list[dict]
    order = {(point.axis, point.value): index for index, point in enumerate(points)}
    todo = in_order_of_worth(points)
    missing = [f"{point.axis} {point.value}" for point in todo]
    for point in todo:
        if rows and arguments.within is not None and time.monotonic() - began > arguments.within:
            print(f"time is up: left out: {'; '.join(missing)}", flush=True)
            break
        try:
            if point.config.model not in checked:
                check(point.config)
                checked.add(point.config.model)
            found = measure(point, arguments.seconds)
        except torch.OutOfMemoryError:  # in the check: `measure` answers for its own
            found = [row | {"why_not": "out of memory"} for row in blank(point)]
        rows = sorted([*rows, *found], key=lambda row: order[row["axis"], row["value"]])
        for row in found:
            peak = "" if row["peak_bytes"] is None else f", {row['peak_bytes'] / 2**20:.0f} MiB"
            figure = row["why_not"] or f"{quartiles(row['seconds'], 1e-3)} ms{peak}"
            print(f"{point.axis} {point.value}: {row['recipe']}: {figure}", flush=True)
        missing.pop(0)
        kept.keep(rows, missing)
    kept.finish(rows, missing)
