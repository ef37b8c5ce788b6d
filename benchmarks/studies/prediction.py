"""`python -m benchmarks.prediction`: steps of several recipes on GPUs that are not here, predicted, as a record.

Nothing is measured. Each recipe's step runs on tensors without data with two and with three blocks, its operations are
counted, and what a block adds makes the whole depth; `soflow_fast.training.time_estimate` says how operations become
seconds. The recipes are those of the races, uncompiled. Packages that a row names need not be installed: stand-ins are
counted in their place (`benchmarks.harness.packages`).

What torch.compile would make of a recipe cannot be counted that way. Its row is that of the same operations uncompiled
with the bytes between products of a block replaced by an assumption: `COMPILED_PASSES` over the block's tokens. Where
launches and not bytes are what takes the time, that says nothing, so that small batches have no such row.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import fields
from typing import Any, NamedTuple

from benchmarks.baselines import authors, fused
from benchmarks.harness import command
from benchmarks.harness.contestants import MEANFLOW, QUARTER
from benchmarks.harness.packages import counted_packages
from benchmarks.report import record
from soflow_fast.config.gpus import GPUS, Host
from soflow_fast.config.presets import preset
from soflow_fast.config.schema import Config, override
from soflow_fast.training.memory_estimate import as_counted, attend_as_on_gpu, build_as_on_gpu, images
from soflow_fast.training.operation_count import Operation, Operations
from soflow_fast.training.state import TrainState
from soflow_fast.training.step import train_step
from soflow_fast.training.time_estimate import PhaseTime, phase_time
from soflow_kernels.testing import as_on_gpu

CASES = [("imagenet256-b4", 32), ("imagenet256-b2", 256), ("imagenet256-xl2", 256)]
"""Preset and batch."""
DEPTHS = (2, 3)
COMPILED_PASSES = (20, 48)
"""Reads and writes of one activation [B, T, D] in bf16 that compiled code makes in a block beside products and
attention, in a forward and in a backward: as many as the code has that Inductor makes of the block for a CPU."""
BEFORE_HOPPER = ("a100",)
LEAST_COMPILED = 256
"""The smallest batch whose compiled steps are bounded by bytes."""


class Way(NamedTuple):
    """A recipe as it is counted."""

    name: str
    build: Callable[[Config], TrainState]
    step: Callable[..., Any]
    update: Callable[[TrainState], Any] | None = None
    """For one whose blocks are taken to be compiled: the part of its step that comes after the backward."""
    graph: bool = False
    """Whether it is replayed, so that the host dispatches nothing."""
    packages: bool = False
    """Whether its products and attention are those of packages (`counted_packages`): on Hopper and later alone."""


def build_authors(counted: Config) -> TrainState:
    """The authors' state as it is on a GPU: products in TF32, `foreach` in the optimiser."""
    state = authors.build(counted)
    state.precision = "tf32"
    for group in state.optimizer.param_groups:
        group["foreach"] = True
    return state


def build_keeping(counted: Config) -> TrainState:
    """Our state, which keeps norms and GELUs for the backward, as far as memory has room for them."""
    return build_as_on_gpu(override(counted, {"run.recompute": "nothing"}))


def build_with_packages(counted: Config) -> TrainState:
    """Our state with quack-kernels' products of MLPs and flash-attn's packed attention. Its GELUs are made again, in
    the epilogues of those products."""
    state = build_as_on_gpu(override(counted, {"run.recompute": "none"}))
    state.flow.network.mlp = "quack"
    return state


COMPILED = "authors' recipe in bf16, fused update, compiled by assumption"
WAYS = [
    Way("soflow-fast", build_as_on_gpu, train_step),
    Way("soflow-fast, CUDA graph", build_as_on_gpu, train_step, graph=True),
    Way("soflow-fast, nothing made again", build_keeping, train_step, graph=True),
    Way("soflow-fast, with quack-kernels and flash-attn", build_with_packages, train_step, graph=True, packages=True),
    Way("authors' recipe in TF32", build_authors, authors.train_step),
    Way("authors' recipe in bf16, fused update", fused.build, authors.train_step_fused),
    Way(COMPILED, fused.build, authors.train_step_fused, fused.update),
    Way("MeanFlow as published, in bf16, fused update", MEANFLOW.build, MEANFLOW.step),
    Way("MeanFlow, JVP on a quarter, in bf16, fused update", QUARTER.build, QUARTER.step),
]


def operations(way: Way, config: Config) -> list[Operation]:
    """The operations of a recipe's second step, when the optimiser has its moments; those of its update once more, in
    phase "again", where the recipe is asked for it."""
    counted = as_counted(config)
    with as_on_gpu():
        state = way.build(counted)
        attend_as_on_gpu(state)
        if way.packages:
            state.set_attention("flash2")
        batch = images(state, counted.batch_size)
        with Operations() as counter, counted_packages() if way.packages else nullcontext():
            way.step(state, *batch)
            counter.found.clear()
            way.step(state, *batch)
            if way.update is not None:
                counter.phase = "again"
                way.update(state)
    return counter.found


def compiled_bytes(config: Config) -> int:
    """Bytes beside products and attention of the compiled blocks of the authors' recipe, by `COMPILED_PASSES`: two
    forwards of the flow-matching samples, four of the others, one backward of all."""
    model, fm = config.dit, config.objective.flow_matching_fraction
    activation = config.batch_size * (model.input_size // model.patch_size) ** 2 * model.hidden_size * 2
    forward, backward = COMPILED_PASSES
    return round(model.depth * activation * (forward * (2 * fm + 4 * (1 - fm)) + backward))


class Predicted(NamedTuple):
    """A step on a GPU."""

    launches: float
    bytes: float
    other_bytes: float
    flops: float
    seconds: float


def predict(way: Way, config: Config, found: Sequence[list[Operation]], gpu: str) -> Predicted:
    """A step of a recipe on a GPU. found: its operations at `DEPTHS`."""
    rates, depth = GPUS[gpu], config.dit.depth

    def cost(name: str, chosen: Callable[[Operation], bool], at: int) -> float:
        """One figure of some operations with so many blocks: what a block adds, so many times."""
        two, three = (getattr(phase_time([o for o in part if chosen(o)], rates, Host()), name) for part in found)
        return two + (at - DEPTHS[0]) * (three - two)

    def in_step(operation: Operation) -> bool:
        return operation.phase != "again"

    launches, size, others, flops, seconds, host = (cost(field.name, in_step, depth) for field in fields(PhaseTime))
    if way.update is None:
        return Predicted(launches, size, others, flops, seconds if way.graph else max(seconds, host))

    def between_products(name: str) -> float:
        """What blocks have beside products and attention, without their update."""
        of_step, of_update = (
            cost(name, chosen, depth) - cost(name, chosen, 0)
            for chosen in (lambda o: in_step(o) and o.kind == "other", lambda o: not in_step(o))
        )
        return of_step - of_update

    fused_bytes = compiled_bytes(config)
    return Predicted(
        math.nan,
        size - between_products("bytes") + fused_bytes,
        others - between_products("other_bytes") + fused_bytes,
        flops,
        seconds - between_products("gpu") + fused_bytes / rates.copy,
    )


def predictions(name: str, batch: int, ways: Sequence[Way] | None = None) -> list[dict]:
    """A row for each recipe (None: all) on a preset's network."""
    config = override(preset(name), {"batch_size": batch})
    rows = []
    counts: dict[tuple, list[list[Operation]]] = {}
    for way in WAYS if ways is None else ways:
        if way.update is not None and batch < LEAST_COMPILED:
            continue
        key = way.build, way.step, way.update
        if key not in counts:
            counts[key] = [operations(way, override(config, {"model.depth": depth})) for depth in DEPTHS]
        gpus = [gpu for gpu in GPUS if not (way.packages and gpu in BEFORE_HOPPER)]
        on = {gpu: predict(way, config, counts[key], gpu) for gpu in gpus}
        first = next(iter(on.values()))
        rows.append(
            {
                "case": f"{name}, batch {batch}",
                "recipe": way.name,
                "batch": batch,
                "launches": None if math.isnan(first.launches) else round(first.launches),
                "bytes": round(first.bytes),
                "other_bytes": round(first.other_bytes),
                "flops": round(first.flops),
                "predicted_ms": {gpu: 1e3 * found.seconds for gpu, found in on.items()},
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = command.Parser(prog="python -m benchmarks.prediction", description=__doc__)
    parser.parse(argv)
    kept = record.Growing("prediction", argv)
    rows: list[dict] = []
    missing = [f"{name}, batch {batch}" for name, batch in CASES]
    for name, batch in CASES:
        for row in predictions(name, batch):
            rows.append(row)
            times = ", ".join(f"{gpu} {ms:.4g} ms" for gpu, ms in row["predicted_ms"].items())
            print(f"{row['case']}: {row['recipe']}: {times}", flush=True)
        missing.pop(0)
        kept.keep(rows, missing)
    kept.finish(rows, missing)
