"""`python -m benchmarks.cpu`: a step on this CPU in bf16 and float32 beside the authors' float32 recipe, as a record.

In turn, round after round, in one run; each of ours has passed the comparison with float64. In bf16 the quotient is
taken by increments, which are exact; in float32 by a pair of forwards, as the authors do.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from benchmarks.baselines.authors import AUTHORS
from benchmarks.correctness.step import check_precision
from benchmarks.harness import command
from benchmarks.harness.cases import Case, cases
from benchmarks.harness.race import figures, rows_in_turn
from benchmarks.harness.recipes import build, ours
from benchmarks.report import record
from soflow_fast.errors import UserError
from soflow_fast.training.cpu_precision import has_products

WAYS = {
    "authors' recipe, fp32": (AUTHORS, "fp32"),
    "soflow-fast, fp32": (ours("soflow-fast, fp32"), "fp32"),
    "soflow-fast, bf16": (ours("soflow-fast, bf16"), "bf16"),
}


def measure(case: Case, seconds: float) -> list[dict]:
    """A row a recipe, with the time of every round."""
    device, steps = torch.device("cpu"), {}
    for name, (recipe, precision) in WAYS.items():
        config = replace(case.config, precision=precision)
        check_precision(config)
        state, batch = build(recipe, config), case.batch(device)
        steps[name] = partial(recipe.step, state, *batch)
    return rows_in_turn(case, steps, device, seconds)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Raises UserError on a CPU without bf16 products, or where there is a GPU."""
    parser = command.Parser(prog="python -m benchmarks.cpu", description=__doc__)
    parser.add_argument("--seconds", type=command.seconds, default=60.0, help="how long to time each network (60)")
    seconds = parser.parse(argv).seconds
    if torch.cuda.is_available() or not has_products():
        raise UserError("benchmarks.cpu: is for a CPU with bf16 products (avx512_bf16, amx), without a GPU beside it")
    kept, rows = record.Growing("cpu", argv), []
    for case in (case.at(32) for case in cases() if case.config.dit.hidden_size >= 256):
        rows += measure(case, seconds)
        for row in rows[-len(WAYS) :]:
            print(f"{row['case']}: {row['way']}: {figures(row)['median_ms']:.1f} ms", flush=True)
        kept.keep(rows)
    kept.finish(rows)
