"""`python -m benchmarks.derivative`: MeanFlow's derivative du/dt by every right way, its error beside its time.

On each network of `pytest benchmarks/` after some steps of training, at the samples of one batch where r != t. The
error is relative to forward mode in float64; the time is that of the derivative alone, beside a student's forward that
is there in any case, everything in turn. The engine's are a pair of float32 forwards, of which the student's is one,
and increments that ride along on it; the baselines' are torch.func.jvp, which makes the values again, and tangents
beside the student's values. Nothing is asserted of the times.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.baselines import meanflow
from benchmarks.baselines.meanflow import At, Student
from benchmarks.correctness.comparison import relative
from benchmarks.harness import command
from benchmarks.harness.cases import Case, cases
from benchmarks.harness.race import figures, rows_in_turn
from benchmarks.harness.recipes import plain_operations
from benchmarks.report import record
from soflow_fast.config.schema import override
from soflow_fast.models.dit import TapedOutputs
from soflow_fast.objective import ConsistencyPoints
from soflow_fast.training.consistency_target import ConsistencyTarget, value_and_increment
from soflow_fast.training.precision import matmul_precision
from soflow_fast.training.state import TrainState
from soflow_fast.training.step import draw, train_step

CHANGES = {"objective": "meanflow", "objective.guidance_scale": 1.0, "objective.fm_fraction": 0.75}


@dataclass
class Place:
    """Where the derivative is taken, and the student's forward there."""

    state: TrainState
    points: ConsistencyPoints
    student: Student

    @property
    def at(self) -> At:
        """As the baselines take it."""
        p = self.points
        assert p.y is not None
        return At(p.x, p.t, p.s, p.y, p.target)


Way = Callable[[Place], Tensor]


def by_engine(place: Place, kind: str) -> Tensor:
    """The increment over the distance, as in a step."""
    state, student = place.state, place.student
    target = ConsistencyTarget(kind, state.precision, "student")
    tape = student.tape if kind == "increments" else None
    value, increment = value_and_increment(target, state.flow, None, place.points, student.output, tape)
    return state.objective.quotient(state.flow, place.points, value, increment)


def by_jvp(place: Place) -> Tensor:
    """torch.func.jvp."""
    with plain_operations(), matmul_precision(place.state.precision, place.state.device):
        return meanflow.jvp(place.state.flow.network, place.at)[1].float()


def by_tangents(place: Place) -> Tensor:
    """Tangents beside the student's values."""
    with plain_operations(), matmul_precision(place.state.precision, place.state.device):
        return meanflow.by_tangents(place.state, place.at, place.student).float()


WAYS: dict[str, dict[str, Way]] = {
    "fp32": {
        "torch.func.jvp": by_jvp,
        "tangents beside the student's values": by_tangents,
        "pair of forwards": partial(by_engine, kind="pair"),
        "increments": partial(by_engine, kind="increments"),
    },
    "bf16": {
        "torch.func.jvp": by_jvp,
        "tangents beside the student's values": by_tangents,
        "increments": partial(by_engine, kind="increments"),
    },
}
"""By the precision of the student."""


def trained(case: Case, steps: int) -> dict[str, Tensor]:
    """The weights after some steps in float32: those of the start make a network that is constant."""
    config = override(case.config, {**CHANGES, "precision": "fp32", "run.check_quotient_every": 0})
    state = TrainState.build(config)
    batch = case.batch(state.device)
    for _ in range(steps):
        train_step(state, *batch)
    return state.weights()


@torch.no_grad()
def place(case: Case, precision: str, weights: dict[str, Tensor]) -> Place:
    """The samples of a batch where r != t."""
    state = TrainState.build(override(case.config, {**CHANGES, "precision": precision}), weights=weights)
    x0, y = case.batch(state.device)
    draws = draw(state, x0.shape)
    sc = slice(draws.n_fm, None)
    t, l, s = (value[sc] for value in (draws.t, draws.l, draws.s))
    x, v = state.flow.point(x0[sc], draws.x1[sc], t)
    ahead = state.objective.look_ahead(x, v, t, l, None, None, None)
    tape = TapedOutputs(slice(None))
    with matmul_precision(precision, state.device):
        output = state.flow.network(x, t, s, y[sc], tape=tape).float()
    return Place(state, ConsistencyPoints(x, *ahead, t, l, s, y[sc]), Student(output, tape))


def exact(place: Place) -> Tensor:
    """du/dt by forward mode in float64, of the network with the weights as they are rounded."""
    network = copy.deepcopy(place.state.flow.network).double()
    at = At(*(value.double() if value.is_floating_point() else value for value in place.at))
    with plain_operations(), torch.no_grad():
        return meanflow.jvp(network, at)[1]


def measure(case: Case, seconds: float, steps: int) -> list[dict]:
    """A row for each way, with its error and the time of every round."""
    weights, rows = trained(case, steps), []
    for precision, ways in WAYS.items():
        where = place(case, precision, weights)
        wanted = exact(where)
        with torch.no_grad():
            calls = {name: partial(torch.no_grad()(way), where) for name, way in ways.items()}
            errors = {name: relative([call()], [wanted]) for name, call in calls.items()}
        samples = case.at(len(wanted))
        for row in rows_in_turn(samples, calls, where.state.device, seconds / len(WAYS)):
            rows.append(row | {"precision": precision, "error": errors[row["way"]], "steps": steps})
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = command.Parser(prog="python -m benchmarks.derivative", description=__doc__)
    about = "about how long to time each network (20)"
    parser.add_argument("--seconds", type=command.seconds, default=20.0, help=about)
    about = "steps of training before (100)"
    parser.add_argument("--steps", type=command.count, default=100, metavar="N", help=about)
    options = parser.parse(argv)
    kept, rows = record.Growing("derivative", argv), []
    for case in cases():
        small = replace(case.config, run=replace(case.config.run, cuda_graph=False))
        rows += measure(case._replace(config=small), options.seconds, options.steps)
        for row in rows[-sum(map(len, WAYS.values())) :]:
            what = f"{row['case']}, {row['precision']}: {row['way']}"
            print(f"{what}: error {row['error']:.1e}, {figures(row)['median_ms']:.2f} ms", flush=True)
        kept.keep(rows)
    kept.finish(rows)
