"""One race: every recipe on one network and batch, gate first, then timed in turn within one run."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from benchmarks import account, ceilings, gates
from benchmarks.cases import Case
from benchmarks.ceilings import synchronize
from benchmarks.recipes import OURS, Recipe, build
from soflow_fast.state import resolve_device

__all__ = ["OURS", "Race", "Row", "figures", "heats", "largest", "speed_ups", "synchronize"]

WARM_UP = 2
STATE_BYTES = 24
"""A parameter's share of a training state: weight, its average, two of AdamW, gradient, copy in bf16, slack."""
LARGEST = 2048
"""The batch that `largest` begins with."""


@dataclass(kw_only=True)
class Row:
    """What is known of one recipe on one case; `as_dict` is what a record keeps."""

    case: str
    recipe: str
    precision: str = ""
    batch: int = 0
    skipped: str | None = None
    """Why there is nothing more."""
    parameters: int = 0
    network_calls: int = 0
    flops_per_image: float = 0.0
    """Counted; the products alone, as the FLOP counter knows them."""
    forwards_per_image: float = 0.0
    """FLOPs of the step in units of one forward on one image."""
    bytes_per_image: float | None = None
    """That the operations read and write, counted as they are dispatched; None for compiled code, which is not seen."""
    kept_for_backward: int | None = None
    """Bytes that autograd keeps, by saved_tensors_hooks; on a CPU."""
    peak_allocated: int | None = None
    """Bytes, alone on the GPU; None on a CPU."""
    peak_reserved: int | None = None
    product_ceiling: float = 0.0
    """FLOP/s of one large product in this precision, in this run."""
    copy_ceiling: float = 0.0
    """Bytes/s of one large copy, in this run."""
    gate: dict[str, float] = field(default_factory=dict)
    """Relative errors that the gate found."""
    seconds: list[float] = field(default_factory=list)
    """Every timed step, in order; sample i of each recipe is of round i."""

    def as_dict(self) -> dict:
        return vars(self) | {"seconds": list(self.seconds)}


class Race:
    """The recipes of one case, ours first. Building it runs the gate for each baseline (raises RedGate).

    A baseline that cannot run here, or does not fit into the memory, keeps a row that says so.
    """

    def __init__(self, case: Case, baselines: list[Recipe]) -> None:
        self.case = case
        self.rows: dict[str, Row] = {}
        self.steps: dict[str, Callable[[], None]] = {}
        recipes = [OURS, *baselines]
        # All are judged and measured before anyone's state stays: a peak of memory is then one recipe's own.
        for act in (self._measure, self._warm_up):
            for recipe in recipes:
                if recipe.name in self.rows and self.rows[recipe.name].skipped:
                    continue
                reason = recipe.why_not(case.config) or self._without_falling(act, recipe)
                if reason:
                    self.rows[recipe.name] = Row(case=case.describe(), recipe=recipe.name, skipped=reason)

    def _measure(self, recipe: Recipe) -> None:
        errors = passed(self.case, recipe)
        self.rows[recipe.name] = entry(self.case, recipe)
        self.rows[recipe.name].gate = errors

    def _warm_up(self, recipe: Recipe) -> None:
        self.steps[recipe.name] = timed_step(self.case, recipe, self.rows[recipe.name].seconds)

    def _without_falling(self, act: Callable[[Recipe], None], recipe: Recipe) -> str | None:
        """None, or that memory ran out; raises it if it is ours that does not fit."""
        try:
            act(recipe)
        except torch.OutOfMemoryError:
            if recipe is OURS:
                raise
            return "out of memory" if act == self._measure else "out of memory beside the others"
        finally:
            release()
        return None

    @property
    def gates(self) -> dict[str, dict[str, float]]:
        """The errors that the gates found, by baseline."""
        return {name: row.gate for name, row in self.rows.items() if row.gate}

    def rounds(self, seconds: float, least: int = 5, most: int = 100) -> int:
        """How many rounds fit into about so many seconds, judged by one round that does not count."""
        began = time.perf_counter()
        for step in self.steps.values():
            step()
        for row in self.rows.values():
            row.seconds.clear()
        return max(least, min(most, int(seconds / (time.perf_counter() - began))))

    def run_baselines(self) -> None:
        """One step of each baseline: a round without ours."""
        for name, step in self.steps.items():
            if name != OURS.name:
                step()


def passed(case: Case, recipe: Recipe) -> dict[str, float]:
    """What the gate finds: of a baseline against ours or float64, of ours against float32. Raises RedGate."""
    return gates.check_precision(case.config) if recipe is OURS else (recipe.gate or gates.check)(case.config, recipe)


def timed_step(case: Case, recipe: Recipe, seconds: list[float]) -> Callable[[], None]:
    """A warm step of a recipe that notes how long it took."""
    state = build(recipe, case.config)
    x0, y = case.batch(state.device)
    for _ in range(max(WARM_UP, recipe.gate_steps)):
        recipe.step(state, x0, y)
    synchronize(state.device)

    def step() -> None:
        began = time.perf_counter()
        recipe.step(state, x0, y)
        synchronize(state.device)
        seconds.append(time.perf_counter() - began)

    return step


def heats(case: Case, baselines: list[Recipe]) -> list[list[Recipe]]:
    """The baselines of one race after the other: on a GPU, as many at a time as leave half of its memory to a step."""
    device = resolve_device(case.config.run.device)
    size = len(baselines)
    if device.type == "cuda":
        each = STATE_BYTES * case.parameters()
        size = max(1, int(torch.cuda.get_device_properties(device).total_memory / 2 / each) - 1)
    return [baselines[k : k + size] for k in range(0, len(baselines), size)]


def entry(case: Case, recipe: Recipe) -> Row:
    """All but the times, from one recipe alone in memory."""
    counted = recipe.counted_as or recipe
    state = build(counted, case.config)
    device = state.device
    x0, y = case.batch(device)
    one = account.forward_flops(state, x0[:1])
    calls = 0

    def first_step() -> None:
        nonlocal calls
        calls, _ = gates.count_calls(counted, state, x0, y)

    flops = account.flops(first_step) / len(x0)
    if counted is not recipe:
        state = build(recipe, case.config)
    moved = None
    if not recipe.compiled:
        moved = account.bytes_moved(lambda: recipe.step(state, x0, y)) / len(x0)
    kept = None
    if device.type == "cpu":
        kept = account.kept_for_backward(state, lambda: recipe.step(state, x0, y))
    allocated, reserved = account.peak_memory(lambda: recipe.step(state, x0, y), device)
    return Row(
        case=case.describe(),
        recipe=recipe.name,
        precision=state.precision,
        batch=len(x0),
        parameters=state.parameter_count(),
        network_calls=calls,
        flops_per_image=flops,
        forwards_per_image=flops / one,
        bytes_per_image=moved,
        kept_for_backward=kept,
        peak_allocated=allocated,
        peak_reserved=reserved,
        product_ceiling=ceilings.product_ceiling(device, state.precision),
        copy_ceiling=ceilings.copy_ceiling(device),
    )


def largest(case: Case, recipe: Recipe, rounds: int = 10) -> Row:
    """A recipe alone on the GPU at the largest batch that fits, found by halving, after its gate."""
    name = f"{case.describe().rsplit(', batch', 1)[0]}, each alone at the largest batch that fits"
    reason = recipe.why_not(case.config)
    errors = {} if reason else passed(case, recipe)
    batch = LARGEST
    while batch and not reason:
        at = case.at(batch)._replace(name=name)
        try:
            row = entry(at, recipe)
            step = timed_step(at, recipe, row.seconds)
            for _ in range(rounds):
                step()
            row.case, row.gate = name, errors
            return row
        except torch.OutOfMemoryError:
            batch //= 2
        release()
    return Row(case=name, recipe=recipe.name, skipped=reason or "out of memory")


def release() -> None:
    """Give back what nobody holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def figures(row: dict) -> dict[str, float]:
    """Median and quartiles in ms, and images per second, of a row as recorded."""
    ms = [1e3 * value for value in row["seconds"]]
    low, middle, high = statistics.quantiles(ms, n=4, method="inclusive") if len(ms) > 1 else ms * 3
    return {"median_ms": middle, "low_ms": low, "high_ms": high, "images_per_s": 1e3 * row["batch"] / middle}


def speed_ups(rows: list[dict]) -> dict[str, float]:
    """By baseline of one case: our images per second over its own."""
    speeds = {row["recipe"]: figures(row)["images_per_s"] for row in rows if row["seconds"]}
    if OURS.name not in speeds:
        return {}
    ours = speeds.pop(OURS.name)
    return {name: ours / value for name, value in speeds.items()}
