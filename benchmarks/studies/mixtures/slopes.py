"""The derivative of a trained network along the velocity, by a look-ahead and by a central difference."""

import torch
from torch import Tensor

from benchmarks.baselines.central import slope
from benchmarks.baselines.meanflow import attending, composed_attention
from benchmarks.harness.recipes import plain_operations
from benchmarks.studies.mixtures.problems import batch, mixture
from benchmarks.studies.mixtures.trainings import base
from soflow_fast.flow import SolutionFlow, per_sample
from soflow_fast.rng import generator
from soflow_fast.training.state import TrainState, filled_flow

R = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)
"""Distances of the two ends, in units of t - s."""


def ahead(flow: SolutionFlow, x: Tensor, v: Tensor, t: Tensor, s: Tensor, d: Tensor) -> Tensor:
    """(N(x_t, t, s) - N(x_t - d v, t - d, s)) / d, [B, C, H, W]."""
    end = flow.network(x - per_sample(d, x) * v, t - d, s, None)
    return (flow.network(x, t, s, None) - end) / per_sample(d, x)


def slopes(name: str, steps: int, batches: int = 8) -> list[dict]:
    """A row for each distance, way and precision: the error relative to forward mode in float64, of the derivative
    times t - s, as it enters q, at samples as training draws them whose later end is not beyond 1."""
    torch.set_num_threads(1)
    state = base(name, steps)
    with torch.no_grad():
        return measured(name, state, batches)


def measured(name: str, state: TrainState, batches: int) -> list[dict]:
    """`slopes` of a network."""
    config, data, source = state.config, mixture(name), generator(0, 0, 0, "slopes")
    x0 = torch.cat([batch(data, config, state.step + k) for k in range(batches)]).double()
    x1 = torch.randn(x0.shape, generator=source, dtype=torch.float64)
    t, s = state.objective.consistency_times(len(x0), source, torch.float64)
    fits = t + max(R) / 2 * (t - s) < 1
    x0, x1, t, s = (value[fits] for value in (x0, x1, t, s))
    wide = filled_flow(config, {key: value.double() for key, value in state.weights().items()})
    x, v = wide.point(x0, x1, t)
    length = per_sample(t - s, x)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return wide.network(x, t, s, None)

    with plain_operations(), attending(wide.network, composed_attention):
        exact = length * torch.func.jvp(network, (x, t), (v, torch.ones_like(t)))[1]
    rows = []
    for r in R:
        for precision, flow in (("fp64", wide), ("fp32", state.flow)):
            like = torch.float64 if precision == "fp64" else torch.float32
            points = x.to(like), v.to(like), t.to(like), s.to(like)
            d = (r * (t - s)).to(like)
            for way, found in (("ahead", ahead(flow, *points, d)), ("central", slope(flow, *points, d, None))):
                error = float((length * found.double() - exact).norm() / exact.norm())
                rows.append(
                    {"kind": "slope", "problem": name, "r": r, "way": way, "precision": precision, "error": error}
                )
    return rows
