"""`python -m benchmarks.memory`: the memory of a training on a CPU, in float32 and bf16 beside the authors' recipe.

Counted, not timed: what the state holds between two steps, and how much more is allocated at the peak of a step. So it
does not matter what else the machine does.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.baselines.authors import AUTHORS
from benchmarks.harness import command
from benchmarks.harness.account import allocated_peak
from benchmarks.harness.cases import Case, cpu_cases
from benchmarks.harness.recipes import OURS, Recipe, build, ours
from benchmarks.harness.timing import release
from benchmarks.report import record
from benchmarks.studies.sweeps import network
from soflow_fast.config.schema import Config
from soflow_fast.errors import UserError
from soflow_fast.training.state import TrainState

AGAIN = ours("soflow-fast, --recompute none", run__recompute="none")
WAYS = {
    "authors' recipe, fp32": (AUTHORS, "fp32"),
    "soflow-fast, fp32": (OURS, "fp32"),
    "soflow-fast, fp32, --recompute none": (AGAIN, "fp32"),
    "soflow-fast, bf16": (OURS, "bf16"),
    "soflow-fast, bf16, --recompute none": (AGAIN, "bf16"),
}


def networks() -> list[Case]:
    """One whose activations take most, and one whose weights do: the width and depth of DiT-B."""
    wide = Case("DiT-B", network("cpu", batch=8, hidden=768, depth=12, heads=12, side=16))
    return [cpu_cases()[-1].at(32), wide]


def held(state: TrainState) -> int:
    """Bytes of weights, averages and what the optimiser keeps, each storage once."""
    optimizer: Any = state.optimizer
    flows = [flow for flow in (state.flow, state.ema, state.teacher) if flow is not None]
    values = [value for flow in flows for value in (*flow.parameters(), *flow.buffers())]
    found = [value for value in (*values, *tree_leaves([*optimizer.state.values()])) if isinstance(value, Tensor)]
    storages = [value.untyped_storage() for value in found]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def measure(case: Case, ways: Sequence[str] = tuple(WAYS)) -> list[dict]:
    """A row a recipe."""
    rows = []
    for way in ways:
        recipe, precision = WAYS[way]
        found = _measure(case, recipe, replace(case.config, precision=precision))
        rows.append({"case": case.describe(), "way": way, "batch": case.config.batch_size, **found})
        release()
    return rows


def _measure(case: Case, recipe: Recipe, config: Config) -> dict[str, int]:
    """The bytes held, and the peak of two steps after a first: the second begins with the first one's gradients."""
    state = build(recipe, config)
    step = partial(recipe.step, state, *case.batch(state.device))
    step()
    state.optimizer.zero_grad()
    return {"held_bytes": held(state), "peak_bytes": allocated_peak(lambda: [step(), step()])}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Raises UserError where there is a GPU, whose memory the step's record has."""
    command.Parser(prog="python -m benchmarks.memory", description=__doc__).parse(argv)
    if torch.cuda.is_available():
        raise UserError("benchmarks.memory: is for a CPU, without a GPU beside it; benchmarks.step has a GPU's memory")
    kept, rows = record.Growing("memory", argv), []
    for case in networks():
        rows += measure(case)
        for row in rows[-len(WAYS) :]:
            print(f"{row['case']}: {row['way']}: {row['peak_bytes'] / 2**20:.0f} MiB at the peak", flush=True)
        kept.keep(rows)
    kept.finish(rows)
