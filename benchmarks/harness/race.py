"""One race: every recipe on one network and batch, checked first, then timed in turn within one run."""

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.correctness import step as step_correctness
from benchmarks.correctness.comparison import IncorrectResult, count_calls
from benchmarks.harness import account, ceilings
from benchmarks.harness.cases import Case
from benchmarks.harness.recipes import OURS, Recipe, build
from benchmarks.harness.timing import InTurn, Stopwatch, release
from soflow_fast.config.schema import Config
from soflow_fast.training.precision import resolve_device

WARM_UP = 2
STATE_BYTES = 24
"""Bytes of a training state for a parameter: weight, its average, two of AdamW, gradient, copy in bf16, slack."""
LARGEST = 2048
"""The batch that `largest` begins with."""


@dataclass(kw_only=True)
class Row:
    """The figures of one recipe on one case; a record keeps `as_dict`."""

    case: str
    recipe: str
    precision: str = ""
    batch: int = 0
    skipped: str | None = None
    """Why there is nothing more."""
    failed: bool = False
    """Whether that is a fault."""
    parameters: int = 0
    network_calls: int = 0
    flops_per_image: float = 0.0
    """Counted; the products alone, as the FLOP counter knows them."""
    forwards_per_image: float = 0.0
    """FLOPs of the step in units of one forward on one image."""
    bytes_per_image: float | None = None
    """Bytes that the operations read and write, counted as they are dispatched; None for compiled code, not seen."""
    kept_for_backward: int | None = None
    """Bytes that autograd keeps, by saved_tensors_hooks; on a CPU."""
    peak_allocated: int | None = None
    """Bytes, alone on the GPU; None on a CPU."""
    peak_reserved: int | None = None
    product_ceiling: float = 0.0
    """FLOP/s of one large product in this precision, in this run."""
    copy_ceiling: float = 0.0
    """Bytes/s of one large copy, in this run."""
    errors: dict[str, float] = field(default_factory=dict)
    """Relative errors that the check of correctness found."""
    seconds: list[float] = field(default_factory=list)
    """Every timed step, in order; sample i of each recipe is of round i."""

    def as_dict(self) -> dict:
        return vars(self) | {"seconds": list(self.seconds)}


class Race:
    """The recipes of one case, ours first. Building it checks each for correctness and measures all but its time, one
    alone in memory; then heats of them are warmed up and timed in turn, by `timer`.

    A baseline that cannot run here, does not fit into the memory, computes something else or fails otherwise keeps a
    row that says so. An error of ours is raised.
    """

    def __init__(self, case: Case, baselines: Sequence[Recipe]) -> None:
        self.case = case
        self.recipes = {recipe.name: recipe for recipe in [OURS, *baselines]}
        self.rows = {name: Row(case=case.describe(), recipe=name) for name in self.recipes}
        self.timer = InTurn(resolve_device(case.config.run.device))
        for name, recipe in self.recipes.items():
            self.rows[name].skipped = recipe.why_not(case.config)
            self._attempt(name, self._measure)

    def heats(self) -> list[list[str]]:
        """The baselines that can run, as many at a time as leave half of a GPU's memory to a step; all on a CPU."""
        names = [name for name, row in self.rows.items() if not row.skipped and name != OURS.name]
        device, size = resolve_device(self.case.config.run.device), max(1, len(names))
        if device.type == "cuda":
            half = torch.cuda.get_device_properties(device).total_memory / 2
            size = max(1, int(half / (STATE_BYTES * self.case.parameters())) - 1)
        return [names[k : k + size] for k in range(0, len(names), size)] or [[]]

    def warm_up(self, names: Sequence[str]) -> None:
        """Warm states of ours and of some baselines; those of the heat before are given up."""
        self.timer.clear()
        release()
        for name in (OURS.name, *names):
            self.rows[name].seconds = []
            self._attempt(name, self._enter)

    def results(self, names: Sequence[str], heat: str = "") -> list[dict]:
        """The rows of ours and of some baselines, as recorded."""
        found = [self.rows[name].as_dict() for name in (OURS.name, *names)]
        return [row | {"case": row["case"] + heat} for row in found]

    def absent(self) -> list[dict]:
        """The rows of those that were not timed."""
        return [row.as_dict() for row in self.rows.values() if row.skipped]

    def _measure(self, recipe: Recipe) -> None:
        try:
            errors = checked(self.case.config, recipe)
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError("out of memory in its check") from error
        self.rows[recipe.name] = entry(self.case, recipe)
        self.rows[recipe.name].errors = errors

    def _enter(self, recipe: Recipe) -> None:
        self.timer.add(recipe.name, warm_step(self.case, recipe), self.rows[recipe.name].seconds)

    def _attempt(self, name: str, act: Callable[[Recipe], None]) -> None:
        """Do something with a recipe that is still in the race; it drops out where that fails."""
        if self.rows[name].skipped:
            return
        try:
            act(self.recipes[name])
        except Exception as error:
            if name == OURS.name:
                raise
            self.rows[name].skipped, self.rows[name].failed = why_it_dropped_out(error)
        finally:
            release()


def why_it_dropped_out(error: Exception) -> tuple[str, bool]:
    """The reason that a row gives for a recipe that raised an error, and whether that is a fault and not just a lack of
    memory."""
    said = " ".join(str(error).split())
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return said if said.startswith("out of memory in") else "out of memory", False
    return f"incorrect: {said}" if isinstance(error, IncorrectResult) else f"{type(error).__name__}: {said}", True


@functools.cache
def checked(config: Config, recipe: Recipe) -> dict[str, float]:
    """Relative errors by name: of a baseline against ours or float64, of ours against float32. Raises
    IncorrectResult."""
    if recipe is OURS:
        return step_correctness.check_precision(config)
    return (recipe.check or step_correctness.check)(config, recipe)


def warm_step(case: Case, recipe: Recipe) -> Callable[[], object]:
    """One step of a recipe, ready to be timed."""
    state = build(recipe, case.config)
    x0, y = case.batch(state.device)
    step = functools.partial(recipe.step, state, x0, y)
    for _ in range(max(WARM_UP, recipe.checked_steps)):
        step()
    return step


def entry(case: Case, recipe: Recipe, counted: Row | None = None) -> Row:
    """A row with all but the times, from one recipe alone in memory. counted: a row of the same network at another
    batch, whose counts per image hold here too; a count takes other operations than the step, and more memory."""
    row = Row(case=case.describe(), recipe=recipe.name)
    if counted is None:
        _count(case, recipe, row)
    else:
        row.network_calls, row.bytes_per_image = counted.network_calls, counted.bytes_per_image
        row.flops_per_image, row.forwards_per_image = counted.flops_per_image, counted.forwards_per_image
    state = build(recipe, case.config)
    device = state.device
    x0, y = case.batch(device)
    row.precision, row.batch, row.parameters = state.precision, len(x0), state.parameter_count()
    if counted is None and not recipe.compiled:
        row.bytes_per_image = account.bytes_moved(lambda: recipe.step(state, x0, y)) / len(x0)
    if device.type == "cpu":
        row.kept_for_backward = account.kept_for_backward(state, lambda: recipe.step(state, x0, y))
    row.peak_allocated, row.peak_reserved = account.peak_memory(lambda: recipe.step(state, x0, y), device)
    row.product_ceiling = ceilings.product_ceiling(device, state.precision)
    row.copy_ceiling = ceilings.copy_ceiling(device)
    return row


def _count(case: Case, recipe: Recipe, row: Row) -> None:
    """FLOPs and calls of a first step."""
    recipe = recipe.counted_as or recipe
    state = build(recipe, case.config)
    x0, y = case.batch(state.device)
    one = account.forward_flops(state, x0[:1])

    def first_step() -> None:
        row.network_calls, _ = count_calls(recipe, state, x0, y)

    row.flops_per_image = account.flops(first_step) / len(x0)
    row.forwards_per_image = row.flops_per_image / one


def largest(case: Case, recipe: Recipe, rounds: int = 10) -> Row:
    """A recipe alone on the GPU at the largest batch that fits, to an eighth of it, once it is found correct."""
    name = f"{case.describe().rsplit(', batch', 1)[0]}, each alone at the largest batch that fits"
    found = Row(case=name, recipe=recipe.name, skipped=recipe.why_not(case.config))
    if found.skipped:
        return found
    try:
        errors = checked(case.config, recipe)
        counted = entry(case, recipe)
    except Exception as error:
        if recipe is OURS:
            raise
        found.skipped, found.failed = why_it_dropped_out(error)
        return found
    finally:
        release()

    best: list[Row] = []

    def fits(batch: int) -> bool:
        at = case.at(batch)
        try:
            row = entry(at, recipe, counted)
            release()
            step = warm_step(at, recipe)
            stopwatch = Stopwatch(resolve_device(at.config.run.device))
            row.seconds = [stopwatch.seconds(step) for _ in range(rounds)]
        except (torch.OutOfMemoryError, MemoryError):
            return False
        finally:
            release()
        row.case, row.errors = name, errors
        best[:] = [row]
        return True

    largest_that(fits, LARGEST)
    found.skipped = "out of memory"
    return best[0] if best else found


def largest_that(fits: Callable[[int], bool], most: int) -> int:
    """The largest batch that fits, up to `most` and to an eighth of it, 0 if none does. It is the last that is tried of
    those that fit."""
    batch = most
    while batch and not fits(batch):
        batch //= 2
    if batch == most:
        return batch
    part, least = batch // 2, max(1, batch // 8)
    while part >= least:
        if fits(batch + part):
            batch += part
        part //= 2
    return batch


def figures(row: dict) -> dict[str, float]:
    """Median and quartiles in ms, and images per second, of a row as recorded."""
    ms = [1e3 * value for value in row["seconds"]]
    low, middle, high = statistics.quantiles(ms, n=4, method="inclusive") if len(ms) > 1 else ms * 3
    return {"median_ms": middle, "low_ms": low, "high_ms": high, "images_per_s": 1e3 * row["batch"] / middle}


def speed_ups(rows: list[dict]) -> dict[str, float]:
    """Our images per second over those of each baseline of one case, by its name."""
    speeds = {row["recipe"]: figures(row)["images_per_s"] for row in rows if row["seconds"]}
    if OURS.name not in speeds:
        return {}
    ours = speeds.pop(OURS.name)
    return {name: ours / value for name, value in speeds.items()}
