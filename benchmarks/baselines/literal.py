"""SoFlow with an average of the weights at one end of its consistency target, which does not train.

The look-ahead N(x_l, l, s) comes from the average and N(x_t, t, s) from the student, as a literal reading of "an EMA
teacher" has it. The difference between the two networks is then divided by t - l as well, so the quotient grows as
1 / (t - l). The engine's teacher takes the increment from the average at both ends: that quotient stays bounded.
docs/precision.md has what came of both.
"""

import torch
from torch import Tensor

from benchmarks.baselines import fused
from benchmarks.harness.recipes import Observe, Recipe, plain_operations
from soflow_fast.flow import SolutionFlow
from soflow_fast.objective import Objective, with_null
from soflow_fast.training.precision import matmul_precision
from soflow_fast.training.state import TrainState
from soflow_fast.training.step import Draws, draw
from soflow_kernels import consistency_loss


def consistency(
    flow: SolutionFlow, objective: Objective, teacher: SolutionFlow, x0: Tensor, draws: Draws, y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The consistency loss, mean q^2 and mean weight of samples x0 [B, C, H, W] with labels y [B]."""
    c, dropped = objective.config, draws.label_dropped
    _, t, l, s = draws[:4]
    x_t, v_t = flow.point(x0, draws.x1, t)
    label = with_null(flow, y, dropped)
    with torch.no_grad():
        v_null = flow.velocity(x_t, t, None) if objective.guided else None
        v_label = flow.velocity(x_t, t, label) if objective.mixed else None
        target, _, x_l = objective.look_ahead(x_t, v_t, t, l, v_null, v_label, dropped)
        end = teacher.network(x_l, l, s, label)
    output = flow.network(x_t, t, s, label)
    increment = end - output.detach()
    return consistency_loss(output, increment, x_t, target, t, l, s, p=c.p, eps=c.eps, coefficients=flow.coefficients)


def train_step(state: TrainState, x0: Tensor, y: Tensor, *, observe: Observe | None = None) -> dict[str, Tensor]:
    """One whole update on a labelled batch x0 [B, C, H, W], y [B]. Raises ValueError for a state without a teacher."""
    if state.teacher is None:
        raise ValueError("the target's average is the state's teacher: config.objective.teacher must be 'ema'")
    flow, objective, B = state.flow, state.objective, len(x0)
    draws = draw(state, x0.shape)
    n = draws.n_fm
    late = Draws.of([None if value is None else value[n:] for value in draws.tensors], 0)
    with plain_operations(), matmul_precision(state.precision, state.device):
        fm = objective.flow_matching(flow, x0[:n], draws.x1[:n], draws.t[:n], y[:n], draws.label_dropped[:n])
        loss, mse, weight = consistency(flow, objective, state.teacher, x0[n:], late, y[n:])
        total = fm.loss * (n / B) + loss * ((B - n) / B)
    return fused.finish(state, total, observe, fm_mse=fm.mse, sc_mse=mse, sc_weight=weight)


def network_calls(objective: Objective) -> int:
    """Five with mixed guidance; a sixth is the average's."""
    return 2 + 2 * objective.guided + objective.mixed


LITERAL = Recipe("SoFlow, one end from the average", fused.build, train_step, network_calls)
