"""`python -m benchmarks.increments`: the cost of increments, as a record.

In bf16, on each network of `pytest benchmarks/`: the training step with increments that ride along on the student's
forward, with a pass of their own, and with a plain bf16 pair; and paired_forward over one plain forward of the same
samples. Everything in turn, round after round, in one run. Nothing is asserted of the times.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from benchmarks.correctness.step import check_precision
from benchmarks.harness import command
from benchmarks.harness.cases import Case, cases
from benchmarks.harness.race import figures, rows_in_turn
from benchmarks.harness.recipes import OURS, build
from benchmarks.report import record
from soflow_fast import paired_forward
from soflow_fast.training.consistency_target import ConsistencyTarget
from soflow_fast.training.precision import matmul_precision
from soflow_fast.training.state import TrainState
from soflow_fast.training.step import train_step

INCREMENTS = ConsistencyTarget("increments", "bf16", "student")


class Apart(ConsistencyTarget):
    """Increments in a pass of their own, even where they could ride along."""

    def rides_along(self, precision: str) -> bool:
        return False


WAYS: dict[str, ConsistencyTarget] = {
    "step, increments ride along": INCREMENTS,
    "step, increments in a pass of their own": Apart(*INCREMENTS),
    "step, bf16 pair": ConsistencyTarget("pair", "bf16", "student"),
}


def contestants(case: Case) -> dict[str, Callable[[], object]]:
    """The calls that are timed, by name."""
    config = replace(case.config, precision="bf16")
    check_precision(config)
    steps: dict[str, Callable[[], object]] = {}
    for name, target in WAYS.items():
        state = build(OURS, config)
        state.target = target
        steps[name] = partial(train_step, state, *case.batch(state.device))
    x, y = case.batch(state.device)
    t, dt, s = (torch.full((len(x),), value, device=x.device) for value in (0.8, -0.002, 0.2))
    steps["forward"] = partial(_forward, state, x, t, s, y)
    network = state.flow.network
    steps["paired forward"] = partial(paired_forward, network, x, -0.002 * x, t, dt, s, y, dtype=torch.bfloat16)
    return steps


@torch.no_grad()
def _forward(state: TrainState, x: torch.Tensor, t: torch.Tensor, s: torch.Tensor, y: torch.Tensor) -> None:
    with matmul_precision("bf16", x.device):
        state.flow.network(x, t, s, y)


def measure(case: Case, seconds: float) -> list[dict]:
    """A row a contestant, with the time of every round."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return rows_in_turn(case, contestants(case), device, seconds)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = command.Parser(prog="python -m benchmarks.increments", description=__doc__)
    about = "about how long to time each network (40)"
    parser.add_argument("--seconds", type=command.seconds, default=40.0, help=about)
    seconds = parser.parse(argv).seconds
    kept, rows = record.Growing("increments", argv), []
    for case in cases():
        # All steps and forwards are in memory together, which a GPU's does not hold at the public batch.
        rows += measure(case.at(32) if torch.cuda.is_available() else case, seconds)
        for row in rows[-len(WAYS) - 2 :]:
            print(f"{row['case']}: {row['way']}: {figures(row)['median_ms']:.1f} ms", flush=True)
        kept.keep(rows)
    kept.finish(rows)
