"""One race: every recipe on one network and batch, gate first, then timed in turn within one run."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gates
from benchmarks.cases import Case
from benchmarks.recipes import OURS, Recipe, build, plain_operations
from soflow_fast.state import TrainState

WARM_UP = 2


@dataclass(kw_only=True)
class Row:
    """What is known of one recipe on one case; `as_dict` is what a record keeps."""

    case: str
    recipe: str
    precision: str
    batch: int
    parameters: int
    network_calls: int
    flops_per_image: float
    forwards_per_image: float
    """FLOPs of the step in units of one forward on one image."""
    peak_allocated: int | None
    """Bytes, alone on the GPU; None on a CPU."""
    peak_reserved: int | None
    seconds: list[float] = field(default_factory=list)
    """Every timed step, in order; sample i of each recipe is of round i."""

    def as_dict(self) -> dict:
        return vars(self) | {"seconds": list(self.seconds)}


class Race:
    """The recipes of one case, ours first. Building it runs the gate for each baseline (raises RedGate)."""

    def __init__(self, case: Case, baselines: list[Recipe]) -> None:
        self.case = case
        self.gates = {recipe.name: gates.check(case.config, recipe) for recipe in baselines}
        self.gates[OURS.name] = gates.check_precision(case.config)
        recipes = [OURS, *baselines]
        self.rows = {recipe.name: account(case, recipe) for recipe in recipes}
        self.steps = {recipe.name: self._prepare(recipe) for recipe in recipes}

    def _prepare(self, recipe: Recipe) -> Callable[[], None]:
        state = build(recipe, self.case.config)
        x0, y = self.case.batch(state.device)
        for _ in range(WARM_UP):
            recipe.step(state, x0, y)
        synchronize(state.device)
        seconds = self.rows[recipe.name].seconds

        def step() -> None:
            began = time.perf_counter()
            recipe.step(state, x0, y)
            synchronize(state.device)
            seconds.append(time.perf_counter() - began)

        return step

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


def account(case: Case, recipe: Recipe) -> Row:
    """All but the times, from one recipe alone in memory."""
    state = build(recipe, case.config)
    x0, y = case.batch(state.device)
    one = forward_flops(state, x0[:1])
    counter = FlopCounterMode(display=False)
    with plain_operations(), counter:  # the counter knows PyTorch's products, not those inside a kernel of ours
        calls, _ = gates.count_calls(recipe, state, x0, y)
    flops = counter.get_total_flops() / len(x0)
    allocated, reserved = peak_memory(lambda: recipe.step(state, x0, y), state.device)
    return Row(
        case=case.describe(),
        recipe=recipe.name,
        precision=state.precision,
        batch=len(x0),
        parameters=state.parameter_count(),
        network_calls=calls,
        flops_per_image=flops,
        forwards_per_image=flops / one,
        peak_allocated=allocated,
        peak_reserved=reserved,
    )


def forward_flops(state: TrainState, x: Tensor) -> int:
    """FLOPs of one forward of the network on x."""
    t = torch.ones(len(x), device=x.device)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), plain_operations(), counter:
        state.flow.network(x, t, t)
    return counter.get_total_flops()


def peak_memory(step: Callable[[], object], device: torch.device) -> tuple[int | None, int | None]:
    """Peak bytes allocated and reserved over two warm steps; None on a CPU, whose peak is the whole process's."""
    if device.type != "cuda":
        return None, None
    step()
    synchronize(device)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(2):
        step()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)


def synchronize(device: torch.device) -> None:
    """Wait for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def figures(row: dict) -> dict[str, float]:
    """Median and quartiles in ms, and images per second, of a row as recorded."""
    ms = [1e3 * value for value in row["seconds"]]
    low, middle, high = statistics.quantiles(ms, n=4, method="inclusive") if len(ms) > 1 else ms * 3
    return {"median_ms": middle, "low_ms": low, "high_ms": high, "images_per_s": 1e3 * row["batch"] / middle}


def speed_ups(rows: list[dict]) -> dict[str, float]:
    """By baseline of one case: its median time over ours."""
    medians = {row["recipe"]: figures(row)["median_ms"] for row in rows}
    ours = medians.pop(OURS.name)
    return {name: value / ours for name, value in medians.items()}
