"""The gate of the MeanFlow baselines: du/dt, loss, gradients and update against float64, written down once more.

A library operation without a forward-mode formula gives a zero tangent and says nothing, so du/dt is not checked by
another derivative of the same code but by finite differences of a float64 copy of the network. The step is then held to
a float64 step that is given the very du/dt of the recipe: its tolerance does not depend on how du/dt was come by, and
two recipes that pass differ by no more than their du/dt make them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.baselines.meanflow import STEP, At, Derivative, Draws, Settings, draw
from benchmarks.gates import (
    BATCH,
    CHANGES,
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    RedGate,
    compare_gradients,
    count_calls,
    judge,
    random_batch,
    relative,
)
from benchmarks.recipes import Recipe, build, plain_operations
from soflow_fast.config import Config, override
from soflow_fast.flow import SolutionFlow
from soflow_fast.quotient import products
from soflow_fast.state import TrainState, build_flow

DERIVATIVE_TOLERANCE = 2e-4
"""Of a float32 JVP: some hundred operations, each within 2^-23, and what cancels between them."""
TF32_TOLERANCE = 4e-3
"""Of one whose products are in TF32, 2^-11 each: jvp_flash_attention's, for operands in float32."""
WIDE_STEP = 1e-4
"""h of the central difference in float64: its error, h^2/6 |d3u/dt3| and 2^-52 |u| / h, is about 1e-8 of u."""


class Exact(NamedTuple):
    """One step in float64, up to its gradients."""

    derivative: Tensor
    """du/dt by finite differences where r != t, whatever du/dt the loss was given."""
    loss: Tensor
    fm_mse: Tensor
    sc_mse: Tensor
    gradients: list[Tensor]


def check(
    config: Config, recipe: Recipe, derivative: Derivative, settings: Settings, tolerance: float | None = None
) -> dict[str, float]:
    """Hold one update of a MeanFlow recipe to float64; returns the relative errors by name.

    derivative: the recipe's way to du/dt; tolerance: of it, None: what h makes of a finite difference, truncation and
    rounding. Raises RedGate naming all that differs.
    """
    batch = config.batch_size if recipe.compiled else min(BATCH, config.batch_size)
    config = override(config, CHANGES | {"batch_size": batch})
    state = build(recipe, config)
    wide = widened(state)
    x0, y = random_batch(config, state.device)
    draws = draw(state, x0.shape, settings)
    exact = step_in_float64(wide, state, x0, y, draws, settings)
    given, at = at_float64(wide, state, x0, y, draws)
    if not exact.derivative.norm() >= 1e-2 * given.norm():
        raise RedGate(f"{recipe.name}: du/dt is too small on this network for its absence to be seen")
    with torch.no_grad(), plain_operations(), products(state.precision, state.device):
        found = derivative(state, single(at), given.float())
    if tolerance is None:
        network = wide.network
        with torch.no_grad(), plain_operations():
            before = network(at.z - STEP * at.v, at.t - STEP, at.r, at.y)
        truncation = relative([(given - before) / STEP], [exact.derivative])
        tolerance = truncation + float(2**-22 * given.norm() / (STEP * exact.derivative.norm())) + LOSS_TOLERANCE
    errors = {"du/dt": relative([found], [exact.derivative])}

    calls, metrics = count_calls(recipe, state, x0, y)
    wanted = recipe.network_calls(state.objective)
    faults = [] if calls == wanted else [f"calls the network {calls} times, not {wanted}"]
    step = step_in_float64(wide, state, x0, y, draws, settings, found.double())
    for name in ("loss", "fm_mse", "sc_mse"):
        errors[name] = relative([metrics[name]], [getattr(step, name)])
    norm = torch.stack([g.norm() for g in step.gradients]).norm()
    errors["grad_norm"] = relative([metrics["grad_norm"]], [norm])
    errors |= compare_gradients(state, step.gradients)
    optim = config.optim
    before = [p.detach().double() for p in wide.parameters()]
    # AdamW's first step: its corrected averages are the gradient and its square.
    directions = [g / (g.abs() + optim.eps) for g in step.gradients]
    moves = [-optim.lr * (d + optim.weight_decay * p) for d, p in zip(directions, before, strict=True)]
    averages = [(1 - optim.ema_decay) * move for move in moves]
    for name, right in (("flow", moves), ("ema", averages)):
        mine = [p.detach().double() - p0 for p, p0 in zip(getattr(state, name).parameters(), before, strict=True)]
        errors[f"update of {name}"] = relative(mine, right)
    tolerances = {name: LOSS_TOLERANCE if name.endswith(("mse", "loss")) else GRADIENT_TOLERANCE for name in errors}
    tolerances["du/dt"] = tolerance
    return judge(f"{recipe.name} against float64", errors, tolerances, faults)


def widened(state: TrainState) -> SolutionFlow:
    """The state's flow in float64."""
    wide = build_flow(state.config).to_empty(device=state.device).double()
    wide.load_state_dict(state.flow.state_dict())
    return wide


def single(at: At) -> At:
    """In float32, labels as they are."""
    return At(*(value.float() if value.is_floating_point() else value for value in at))


def point(x0: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """z_t = (1 - t) x + t e and v = e - x in float64."""
    x, e, t = x0.double(), draws.x1.double(), draws.t.double()[:, None, None, None]
    return (1 - t) * x + t * e, e - x


@torch.no_grad()
def guided_velocity(wide: SolutionFlow, state: TrainState, z: Tensor, v: Tensor, y: Tensor, draws: Draws) -> Tensor:
    """v~ of the whole batch."""
    c, t = state.objective.config, draws.t.double()
    w, m = c.guidance_scale, c.mix_ratio
    if w <= 1:
        return v
    with plain_operations():
        u_null, u_label = wide.network(z, t, t, None), wide.network(z, t, t, y)
    omega, kappa = m * w, 1 - m
    target = omega * v + kappa * u_label + (1 - omega - kappa) * u_null
    plain = draws.label_dropped | (draws.t > c.guidance_decay_time)
    return torch.stack([a if left else b for a, b, left in zip(v, target, plain, strict=True)])


def labels(wide: SolutionFlow, y: Tensor, draws: Draws) -> Tensor:
    """The labels that the network sees."""
    return y.masked_fill(draws.label_dropped, wide.network.num_classes)


@torch.no_grad()
def at_float64(wide: SolutionFlow, state: TrainState, x0: Tensor, y: Tensor, draws: Draws) -> tuple[Tensor, At]:
    """u(z, r, t), and where it is taken, of the samples with r != t."""
    z, v = point(x0, draws)
    v, label = guided_velocity(wide, state, z, v, y, draws), labels(wide, y, draws)
    late = slice(draws.n_equal, None)
    at = At(z[late], draws.t[late].double(), draws.r[late].double(), label[late], v[late])
    with plain_operations():
        return wide.network(at.z, at.t, at.r, at.y), at


def step_in_float64(
    wide: SolutionFlow,
    state: TrainState,
    x0: Tensor,
    y: Tensor,
    draws: Draws,
    settings: Settings,
    derivative: Tensor | None = None,
) -> Exact:
    """The formulas of `meanflow`, sample by sample; du/dt by finite differences unless one is given."""
    network, n = wide.network, draws.n_equal
    z, v = point(x0, draws)
    v, label, t, r = (
        guided_velocity(wide, state, z, v, y, draws),
        labels(wide, y, draws),
        draws.t.double(),
        draws.r.double(),
    )
    _, at = at_float64(wide, state, x0, y, draws)
    with torch.no_grad(), plain_operations():
        ends = [network(at.z + h * at.v, at.t + h, at.r, at.y) for h in (WIDE_STEP, -WIDE_STEP)]
    exact = (ends[0] - ends[1]) / (2 * WIDE_STEP)
    du = torch.cat([torch.zeros_like(v[:n]), exact if derivative is None else derivative])
    with plain_operations():
        u = network(z, t, r, label)
        losses, means = [], []
        for i in range(len(z)):
            error = u[i] - (v[i] - (t[i] - r[i]) * du[i])
            square = error.square().sum()
            losses.append(square / (square.detach() + settings.eps) ** settings.p)
            means.append(error.detach().square().mean())
        loss = torch.stack(losses).mean()
        gradients = torch.autograd.grad(loss, list(wide.parameters()), allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, wide.parameters(), strict=True)]
    return Exact(exact, loss.detach(), torch.stack(means[:n]).mean(), torch.stack(means[n:]).mean(), filled)
