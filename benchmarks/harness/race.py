"""One race: the recipes on one network and batch, each checked, built once, measured and then timed.

On a CPU all are in memory together and timed in turn, so that whatever else the machine does hits all alike. On a GPU
each is alone in memory, one after the other: at the batches that matter two do not fit. There ours is first, and last
once more, which shows how much the machine has changed in between.
"""

import functools
import statistics
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.correctness import step as step_correctness
from benchmarks.correctness.comparison import BATCH, IncorrectResult, count_calls
from benchmarks.harness import account, ceilings
from benchmarks.harness.cases import Case
from benchmarks.harness.recipes import OURS, Recipe, build
from benchmarks.harness.timing import InTurn, Stopwatch, release
from soflow_fast.config.schema import Config, override
from soflow_fast.training.precision import resolve_device
from soflow_fast.training.state import TrainState

WARM_UP = 2
GATE_DEPTH = 2
"""Blocks of the network on which a recipe is checked: at its true width, where a check costs little."""
MOST_ROUNDS = 10_000
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
    chosen: str = ""
    """Ways of attention, of MLPs and of what the backward makes again, of ours."""
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
    """The recipes of one case, ours first. Nothing is built until a recipe enters.

    A recipe that cannot run here, does not fit into the memory, computes something else or fails otherwise keeps a row
    that says so.
    """

    def __init__(self, case: Case, recipes: Sequence[Recipe]) -> None:
        self.case, self.device = case, resolve_device(case.config.run.device)
        self.recipes = {recipe.name: recipe for recipe in recipes}
        self.rows: dict[str, Row] = {}
        """Of those that have had their turn."""
        self.timer = InTurn(self.device)

    def groups(self) -> list[list[str]]:
        """The names of those that are in memory together: all on a CPU, each alone on a GPU."""
        names = list(self.recipes)
        return [[name] for name in names] if self.device.type == "cuda" else [names]

    def enter(self, name: str) -> bool:
        """Check a recipe, build it, measure all but its time, and let it take part in `timer`. Whether it does."""
        recipe, config = self.recipes[name], self.case.config
        row = self.rows[name] = Row(case=self.case.describe(), recipe=name, skipped=recipe.why_not(config))
        if row.skipped:
            return False
        where = " in its check"
        try:
            errors = checked(config, recipe)
            where = ""
            release()
            row, step = prepared(self.case, recipe)
        except Exception as error:
            self.failed(name, error, where)
            return False
        finally:
            release()
        row.errors, self.rows[name] = errors, row
        self.timer.add(name, step, row.seconds)
        return True

    def failed(self, name: str, error: Exception, where: str = "") -> None:
        """Let the row of a recipe say that an error ended its turn."""
        row = self.rows[name] = Row(case=self.case.describe(), recipe=name)
        row.skipped, row.failed = why_it_dropped_out(error, where)
        if row.failed and not isinstance(error, IncorrectResult):  # which says all by itself
            traceback.print_exception(error)

    def leave(self) -> None:
        """Give up the states of those that are in memory."""
        self.timer.clear()
        release()

    def results(self) -> list[dict]:
        """The rows of those that have had their turn, as recorded."""
        return [self.rows[name].as_dict() for name in self.recipes if name in self.rows]

    def missing(self) -> list[str]:
        """Those that have not had their turn, as a record names them."""
        return [f"{self.case.describe()}: {name}" for name in self.recipes if name not in self.rows]


def why_it_dropped_out(error: Exception, where: str = "") -> tuple[str, bool]:
    """The reason that a row gives for a recipe that raised an error, and whether that is a fault and not just a lack of
    memory."""
    said = " ".join(str(error).split())
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return f"out of memory{where}", False
    return f"incorrect: {said}" if isinstance(error, IncorrectResult) else f"{type(error).__name__}: {said}", True


def checked(config: Config, recipe: Recipe) -> dict[str, float]:
    """Relative errors by name, on the first blocks of the network: of a baseline against ours or float64, of ours
    against float32. A compiled recipe on a CPU, whose networks are small, is checked on all blocks: the code that is
    compiled for the check is then what is timed. Raises IncorrectResult."""
    whole = recipe.compiled and resolve_device(config.run.device).type == "cpu"
    depth = config.dit.depth if whole else min(GATE_DEPTH, config.dit.depth)
    return _checked(override(config, {"model.depth": depth}), recipe)


@functools.cache
def _checked(config: Config, recipe: Recipe) -> dict[str, float]:
    if recipe is OURS:
        return step_correctness.check_precision(config)
    return (recipe.check or step_correctness.check)(config, recipe)


def prepared(case: Case, recipe: Recipe, counted: Row | None = None) -> tuple[Row, Callable[[], object]]:
    """A row with all but the times, and one warm step to be timed, of one state, built once.

    counted: a row of the same network at another batch, whose counts per image hold here too.
    """
    state = build(recipe, case.config)
    device = state.device
    x0, y = case.batch(device)
    step = functools.partial(recipe.step, state, x0, y)
    row = Row(case=case.describe(), recipe=recipe.name, precision=state.precision, batch=len(x0))
    row.parameters = state.parameter_count()
    row.chosen = chosen(recipe, state)
    step()  # whatever is made or measured on a first call, such as the choice of an attention, is not to be counted
    if counted is None:
        _count(recipe, state, x0[:BATCH], y[:BATCH], row)
        if not recipe.compiled:
            row.bytes_per_image = account.bytes_moved(step) / len(x0)
    else:
        row.network_calls, row.bytes_per_image = counted.network_calls, counted.bytes_per_image
        row.flops_per_image, row.forwards_per_image = counted.flops_per_image, counted.forwards_per_image
    warm_up = max(WARM_UP, recipe.checked_steps)
    if device.type == "cpu":
        row.kept_for_backward = account.kept_for_backward(state, step)
        for _ in range(warm_up):
            step()
    # A recording is made on the way, and its memory counts.
    row.peak_allocated, row.peak_reserved = account.peak_memory(step, device, warm_up)
    row.product_ceiling = ceilings.product_ceiling(device, state.precision)
    row.copy_ceiling = ceilings.copy_ceiling(device)
    return row, step


def chosen(recipe: Recipe, state: TrainState) -> str:
    """In words, the ways of a recipe of ours; empty: of another."""
    if not recipe.name.startswith(OURS.name):
        return ""
    network, again = state.flow.network, state.config.run.recompute
    return f"attention {network.blocks[0].attn.backend}, MLP {network.mlp}, recompute {again}"


def _count(recipe: Recipe, state: TrainState, x0: Tensor, y: Tensor, row: Row) -> None:
    """FLOPs and calls of a step on a few images, by operations one by one, which take more memory than the step's own.
    A recipe that hides its products is counted by another, on a state of that one's."""
    other: Any = recipe.counted_as
    if other is not None:
        recipe, state = other, build(other, state.config)

    def step() -> None:
        row.network_calls, _ = count_calls(recipe, state, x0, y)

    with account.countable():  # once uncounted, for the same reason
        step()
    account.forward_flops(state, x0[:1])
    one = account.forward_flops(state, x0[:1])
    row.flops_per_image = account.flops(step) / len(x0)
    row.forwards_per_image = row.flops_per_image / one


def largest(case: Case, recipe: Recipe, rounds: int = 10) -> Row:
    """A recipe alone on the GPU at the largest batch that fits, to an eighth of it, once it is found correct."""
    name = f"{case.describe().rsplit(', batch', 1)[0]}, each alone at the largest batch that fits"
    found = Row(case=name, recipe=recipe.name, skipped=recipe.why_not(case.config))
    if found.skipped:
        return found
    try:
        errors = checked(case.config, recipe)
        counted = prepared(case, recipe)[0]  # its state is given up
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
        release()  # the state before
        try:
            row, step = prepared(at, recipe, counted)
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


def rows_in_turn(
    case: Case, calls: Mapping[str, Callable[[], object]], device: torch.device, seconds: float
) -> list[dict]:
    """A row for each call on a case, with the time of every round; all in turn for about so many seconds.

    Raises torch.OutOfMemoryError naming those that run out of memory beside the others.
    """
    timer = InTurn(device)
    for name, call in calls.items():
        timer.add(name, call)
    if dropped := timer.run(seconds, least=7, most=MOST_ROUNDS, warm_up=2):
        raise torch.OutOfMemoryError(f"out of memory beside the others: {', '.join(dropped)}")
    return [
        {"case": case.describe(), "way": name, "batch": case.config.batch_size, "seconds": values}
        for name, values in timer.seconds.items()
    ]


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
