"""SoFlow with a central difference in the place of its look-ahead.

The engine takes the change of the network along the velocity target from t and l = t - d: a difference that looks
ahead, of first order in d. This takes it from t + d/2 and t - d/2, as far apart, which is of second order (as TiM does,
arXiv 2509.04394, at a fixed d):

    q = target - N(x_t, t, s) - (t - s) dN/dt,    dN/dt = (N(x_{t+d/2}, t + d/2, s) - N(x_{t-d/2}, t - d/2, s)) / d

with x_{t+h} = x_t + h target. t + d/2 is at most 1: near t = 1 the ends are closer. It costs a call more, as neither
end is the student's own. Without guidance, with Euler coefficients.
"""

import torch
from torch import Tensor

from benchmarks.baselines import fused
from benchmarks.harness.recipes import Observe, Recipe, plain_operations
from soflow_fast.flow import SolutionFlow, per_sample
from soflow_fast.objective import TIME_GAP, Objective
from soflow_fast.training.precision import matmul_precision
from soflow_fast.training.state import TrainState
from soflow_fast.training.step import Draws, draw


def slope(flow: SolutionFlow, x: Tensor, target: Tensor, t: Tensor, s: Tensor, d: Tensor, y: Tensor | None) -> Tensor:
    """dN/dt along the target [B, C, H, W] by the two ends at t + d/2 and t - d/2; d [B]."""
    half = d / 2
    after, before = (flow.network(x + per_sample(h, x) * target, t + h, s, y) for h in (half, -half))
    return (after - before) / per_sample(d, x)


def quotient(flow: SolutionFlow, x: Tensor, target: Tensor, times: tuple[Tensor, ...], y: Tensor | None) -> Tensor:
    """q of the formula above without its - N(x_t, t, s), for times t, l, s [B]."""
    t, l, s = times
    d = torch.minimum(t - l, 2 * (1 - t).clamp_min(TIME_GAP / 2))
    return target - per_sample(t - s, x) * slope(flow, x, target, t, s, d, y)


def consistency(
    flow: SolutionFlow, objective: Objective, x0: Tensor, draws: Draws, y: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The surrogate loss, whose gradient is the engine's with this q, mean q^2 and mean weight, of samples
    x0 [B, C, H, W] with labels y [B]."""
    c = objective.config
    _, t, l, s = draws[:4]
    x_t, target = flow.point(x0, draws.x1, t)
    with torch.no_grad():
        rest = quotient(flow, x_t, target, (t, l, s), y)
    output = flow.network(x_t, t, s, y)
    with torch.no_grad():
        q = rest - output
        square = q.square().flatten(1).mean(1)
        weight = (square + c.eps) ** -c.p
    # b(t, s) = s - t is negative: the gradient of N is that of -w q.
    loss = -(output * per_sample(weight, q) * q).flatten(1).mean(1).mean()
    return loss, square.mean(), weight.mean()


def train_step(state: TrainState, x0: Tensor, y: Tensor | None, *, observe: Observe | None = None) -> dict[str, Tensor]:
    """One whole update on a batch x0 [B, C, H, W], y [B]. Raises ValueError for an objective or coefficients that it
    does not know."""
    flow, objective, B = state.flow, state.objective, len(x0)
    if objective.guided or objective.config.kind != "soflow" or flow.coefficients != "euler":
        raise ValueError("a central difference takes SoFlow without guidance, with Euler coefficients")
    draws = draw(state, x0.shape)
    n = draws.n_fm
    late = Draws.of([None if value is None else value[n:] for value in draws.tensors], 0)
    first, rest = (None, None) if y is None or not state.config.model.conditional else (y[:n], y[n:])
    with plain_operations(), matmul_precision(state.precision, state.device):
        fm = objective.flow_matching(flow, x0[:n], draws.x1[:n], draws.t[:n], first)
        loss, mse, weight = consistency(flow, objective, x0[n:], late, rest)
        total = fm.loss * (n / B) + loss * ((B - n) / B)
    return fused.finish(state, total, observe, fm_mse=fm.mse, sc_mse=mse, sc_weight=weight)


CENTRAL = Recipe("SoFlow, central difference", fused.build, train_step, lambda objective: 4)
"""Of flow matching one call of its own, of consistency the student's and the two ends'."""
