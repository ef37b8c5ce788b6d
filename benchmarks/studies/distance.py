"""`python -m benchmarks.distance`: what rounding makes of a difference, by the distance of its two ends, as a record.

A network's slope dN/dt along the path is what the one-step objectives learn from, multiplied by t - s. Two ways to it
from two forwards, both without a Jacobian-vector product:

* SoFlow (arXiv 2512.15657) looks ahead: (N(x_t, t, s) - N(x_l, l, s)) / (t - l), with t - l = r (t - s), which shrinks
  to 0.002 (t - s) as training goes on;
* TiM (Transition Models, arXiv 2509.04394) takes a central difference of a fixed half-width e = 0.005:
  (N(x_{t+e}, t + e, s) - N(x_{t-e}, t - e, s)) / 2e. Its ends are 0.01 apart however long it trains.

Small DiTs are trained on the digits in float32, then each way is taken in each precision on 256 samples that lie at
least 0.1 before their end. Its error is held against float64 twice: that of the slope, and that of the residual, which
is what the loss squares: for SoFlow q with this look-ahead, for TiM v - N - (t - s) dN/dt with the exact derivative, so
that what truncation costs it is seen too. `python -m benchmarks.report` makes the table of docs/precision.md from it.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import command
from benchmarks.report import record
from benchmarks.studies.precision import configuration, train
from soflow_fast.config.schema import Config, DiTConfig
from soflow_fast.data import open_source
from soflow_fast.flow import SolutionFlow, per_sample
from soflow_fast.models.dit import DiT
from soflow_fast.models.paired_forward import paired_forward
from soflow_fast.training.precision import OPERAND, matmul_precision
from soflow_fast.training.state import TrainState, filled_flow

DISTANCES = (0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)
"""t - l of a look-ahead."""
HALF_WIDTHS = (0.05, 0.005, 0.0005)
"""e of a central difference; TiM's is 0.005."""
R_END = 0.002
"""r at the end of the public schedule."""
FAR = 0.1
"""The least t - s of a sample."""
EXACT_STEP = 1e-4
"""e of the float64 derivative: its truncation, e^2/6 |d3N/dt3|, and 2^-52 |N| / e are about 1e-8 of N."""
SAMPLES = 256
WAYS = ("bf16 pair", "float32 pair", "bf16 increments")


class Points(NamedTuple):
    """Samples on the path, in float64: x [B, C, H, W] moves by v as t [B] does; end times s and labels y [B]."""

    x: Tensor
    v: Tensor
    t: Tensor
    s: Tensor
    y: Tensor


def networks(steps: int, wide_steps: int) -> dict[str, Config]:
    """What is trained, by name: the digits as shipped, and at the width of DiT-B."""
    small = configuration(0, R_END, steps)
    model = replace(small.model, hidden_size=768, num_heads=12)
    optim = replace(small.optim, lr=5e-4, warmup_steps=min(50, wide_steps))
    wide = replace(small, model=model, optim=optim, steps=wide_steps)
    return {describe(config.dit): config for config in (small, wide)}


def describe(model: DiTConfig) -> str:
    """The sizes, in words."""
    return f"hidden {model.hidden_size}, depth {model.depth}, {(model.input_size // model.patch_size) ** 2} tokens"


def points(state: TrainState, seed: int, samples: int = SAMPLES) -> Points:
    """Samples of the consistency part as training draws them, those left out whose end is near."""
    source, made = torch.Generator().manual_seed(seed), []
    batches = open_source(state.config)
    while sum(len(t) for _, _, t, _, _ in made) < samples:
        x0, y = batches.batch(len(made))
        x1 = torch.randn(x0.shape, generator=source)
        t, s = state.objective.consistency_times(len(x0), source)
        x, v = state.flow.point(x0.double(), x1.double(), t.double())
        # Room for the far end of the widest difference, too.
        far = (t - s >= FAR) & (t + max(HALF_WIDTHS) <= 1)
        made.append((x[far], v[far], t[far].double(), s[far].double(), y[far]))
    return Points._make(torch.cat(parts)[:samples] for parts in zip(*made, strict=True))


@torch.no_grad()
def ends(way: str, network: DiT, at: Points, before: float, after: float) -> tuple[Tensor, Tensor]:
    """N at t + before, and N at t + after less that, in float64: of `way`, or of a float64 network ("")."""
    start, dx, dt = at.x + before * at.v, (after - before) * at.v, torch.full_like(at.t, after - before)
    if not way:
        value = network(start, at.t + before, at.s, at.y)
        return value, network(start + dx, at.t + after, at.s, at.y) - value
    precision = "fp32" if way.startswith("float32") else "bf16"
    x, dx, t, dt, s = (value.float() for value in (start, dx, at.t + before, dt, at.s))
    if way.endswith("increments"):
        value, increment = paired_forward(network, x, dx, t, dt, s, at.y, dtype=OPERAND[precision])
        return value.double(), increment.double()
    end = (at.x + after * at.v).float(), (at.t + after).float()
    with matmul_precision(precision, x.device):
        value = network(x, t, s, at.y).double()
        return value, network(*end, s, at.y).double() - value


def compared(found: Tensor, exact: Tensor) -> tuple[float, float]:
    """The relative error, and the cosine."""
    cosine = torch.nn.functional.cosine_similarity(found.flatten(), exact.flatten(), dim=0)
    return float((found - exact).norm() / exact.norm()), float(cosine)


def measure(name: str, config: Config, samples: int = SAMPLES) -> list[dict]:
    """Train one network and compare every way at every distance."""
    torch.set_num_threads(1)
    state, _ = train(config)
    flow: SolutionFlow = state.flow
    wide = filled_flow(state.config, {key: value.double() for key, value in state.weights().items()}).network
    at = points(state, config.seed, samples)
    length = per_sample(at.t - at.s, at.x)
    value, change = ends("", wide, at, 0.0, 0.0)[0], ends("", wide, at, -EXACT_STEP, EXACT_STEP)[1]
    derivative = change / (2 * EXACT_STEP)
    shared = {"network": name, "steps": config.steps, "median_interval": float((at.t - at.s).median())}
    rows = []

    def add(method: str, distance: float, way: str, found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> None:
        row = shared | {"method": method, "distance": distance, "way": way}
        for what, a, b in zip(("slope", "residual"), found, exact, strict=True):
            row[f"{what}_error"], row[f"{what}_cosine"] = compared(a, b)
        # How large the difference is beside the value that it is taken from.
        rows.append(row | {"signal": float(distance * exact[0].norm() / value.norm())})

    def residual(start: Tensor, slope: Tensor, distance: float = 0.0) -> Tensor:
        """q, or what it goes to as l -> t: v - N_t + (distance - (t - s)) slope, as N_l = N_t - distance slope."""
        return at.v - start + (distance - length) * slope

    for distance in DISTANCES:
        for way in ("", *WAYS):
            start, increment = ends(way, wide if not way else flow.network, at, 0.0, -distance)
            found = -increment / distance, residual(start, -increment / distance, distance)
            if not way:
                exact = found
            else:
                add("look-ahead", distance, way, found, exact)
    for e in HALF_WIDTHS:
        for way in WAYS:
            slope = ends(way, flow.network, at, -e, e)[1] / (2 * e)
            start = ends(way, flow.network, at, 0.0, e)[0]
            found = slope, residual(start, slope)
            add("central difference", 2 * e, way, found, (derivative, residual(value, derivative)))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = command.Parser(prog="python -m benchmarks.distance", description=__doc__)
    parser.add_argument("--steps", type=command.count, default=1500, metavar="N", help="updates of the digits (1500)")
    parser.add_argument("--wide-steps", type=command.count, default=300, metavar="N", help="of the wide network (300)")
    options = parser.parse(argv)
    kept = record.Growing("distance", argv)
    rows: list[dict] = []
    for name, config in networks(options.steps, options.wide_steps).items():
        rows += measure(name, config)
        kept.keep(rows)
        last = {key: rows[-1][key] for key in ("network", "steps", "residual_cosine")}
        print(last, flush=True)
    kept.finish(rows)
