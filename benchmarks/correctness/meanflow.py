"""The check of the MeanFlow baselines: du/dt, loss, gradients and update against float64, written down once more.

A library operation without a forward-mode formula gives a zero tangent and says nothing, so du/dt is not checked by
another derivative of the same code but by finite differences of a float64 copy of the network.

Twice: in float32, and in the precision that is timed. In float32 the step is held to a float64 step that is given the
very du/dt of the recipe: its tolerance does not depend on how du/dt was come by, and two recipes that pass differ by no
more than their du/dt make them. In a lower precision every tolerance is measured: it is twice the error that the same
quantity has if these formulas are evaluated in float64 around a network, and its torch.func.jvp, that round as the
recipe's do. Rounding at other places is of the same size; where it is too large to tell right from wrong, the check
fails.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.baselines.meanflow import (
    STEP,
    At,
    Derivative,
    Draws,
    Settings,
    Student,
    by_central_difference,
    draw,
    jvp,
    one_sided,
)
from benchmarks.correctness.comparison import (
    BATCH,
    CHANGES,
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    ROUNDING_LIMIT,
    STORED,
    IncorrectResult,
    PlainNetwork,
    count_calls,
    error_of_square,
    formulas_alone,
    gradient,
    gradient_errors,
    gradients_of,
    relative,
    require,
    weights_of,
)
from benchmarks.harness.cases import random_batch
from benchmarks.harness.recipes import Recipe, build, initial_flow, plain_operations
from soflow_fast.config.schema import Config, override
from soflow_fast.models.dit import DiT, TapedOutputs
from soflow_fast.training.precision import matmul_precision, resolve_device, resolve_precision
from soflow_fast.training.state import TrainState

DERIVATIVE_TOLERANCE = 2e-4
"""Tolerance of a float32 JVP: some hundred operations, each within 2^-23, and what cancels between them."""
TF32_TOLERANCE = 4e-3
"""Tolerance of a JVP with products in TF32, 2^-11 each: jvp_flash_attention's, for operands in float32."""
WIDE_STEP = 1e-4
"""h of the central difference in float64: its error, h^2/6 |d3u/dt3| and 2^-52 |u| / h, is about 1e-8 of u."""
FAR = 0.3
"""Half-width at which a central difference in bf16 is checked: rounding leaves an error of some per cent there."""
IN_STEP = "du/dt in the step"


class Exact(NamedTuple):
    """One step, up to its gradients."""

    residual: Tensor
    """u - u_tgt, [B, C, H, W]."""
    loss: Tensor
    fm_mse: Tensor
    sc_mse: Tensor
    gradients: list[Tensor]


def check(
    config: Config, recipe: Recipe, derivative: Derivative, settings: Settings, tolerance: float | None = None
) -> dict[str, float]:
    """Hold one update of a MeanFlow recipe to float64, in float32 and in the precision of `config`; returns the
    relative errors by name.

    derivative: the recipe's way to du/dt; tolerance: of it in float32, None: what truncation and rounding make of a
    finite difference, in any precision. Raises IncorrectResult naming all that differs.
    """
    precision = resolve_precision(config.precision, resolve_device(config.run.device))
    with formulas_alone(recipe, precision) as formulas:
        errors = check_in("fp32", config, formulas, derivative, settings, tolerance)
    if precision != "fp32":
        low = check_in(precision, config, recipe, derivative, settings, tolerance)
        errors |= {f"{name} in {precision}": error for name, error in low.items()}
    return errors


def check_central_difference(
    config: Config, recipe: Recipe, at_half_width: Callable[[float], Recipe], half_width: float, settings: Settings
) -> dict[str, float]:
    """`check` for a central difference in the precision of the step. at_half_width: the same recipe at another one.

    It is held to the float64 difference of the same half-width. In bf16 rounding hides most of so short a difference,
    so there the recipe is checked at FAR.
    """
    precision = resolve_precision(config.precision, resolve_device(config.run.device))

    def errors_in(precision: str, recipe: Recipe, half_width: float) -> dict[str, float]:
        by = partial(by_central_difference, half_width=half_width)
        return check_in(precision, config, recipe, by, settings, half_width=half_width)

    with formulas_alone(recipe, precision) as formulas:
        errors = errors_in("fp32", formulas, half_width)
    if precision != "fp32":
        low = errors_in(precision, at_half_width(FAR), FAR)
        errors |= {f"{name} in {precision}": error for name, error in low.items()}
    return errors


def check_in(
    precision: str,
    config: Config,
    recipe: Recipe,
    derivative: Derivative,
    settings: Settings,
    tolerance: float | None = None,
    half_width: float | None = None,
) -> dict[str, float]:
    """`check` in one precision. half_width: du/dt is a central difference of it, and right as such."""
    batch = config.batch_size if recipe.compiled else min(BATCH, config.batch_size)
    config = override(config, CHANGES | {"batch_size": batch, "precision": precision})
    truth = partial(derivative_of, half_width=half_width)
    state = build(recipe, config)
    wide = PlainNetwork(widened(state))
    rounding = PlainNetwork(widened(state, torch.float32), state.precision)
    x0, y = random_batch(config, state.device)
    draws = draw(state, x0.shape, settings)
    u, at = place(wide, state, x0, y, draws)
    derivatives = {"exact": truth(wide, at), "found": found_at(state, at, derivative)}
    if not derivatives["exact"].norm() >= 1e-2 * u.norm():
        raise IncorrectResult(f"{recipe.name}: du/dt is too small on this network for its absence to be seen")
    given = derivatives["found" if state.precision == "fp32" else "exact"]
    before = [p.double() for p in weights_of(state)]
    step = whole_step(wide, state, x0, y, draws, settings, lambda at: given)
    if state.precision == "fp32":
        tolerances = {"du/dt": tolerance or 0.0}
    else:
        right = whole_step(rounding, state, x0, y, draws, settings, partial(truth, rounding))
        tolerances = measured(step, right, draws.n_equal, before, config)
        tolerances["du/dt"] = relative([truth(rounding, at)], [derivatives["exact"]])
        for name, error in tolerances.items():
            if not error <= ROUNDING_LIMIT:
                raise IncorrectResult(
                    f"{recipe.name}: {name} in {precision} is rounding by {error:.1e}, which hides all else"
                )
            stored = STORED if precision == "bf16" and name.startswith(("gradient", "update")) else 0.0
            least = LOSS_TOLERANCE if name.endswith(("mse", "loss")) else GRADIENT_TOLERANCE
            tolerances[name] = 2 * math.hypot(error, stored) + least
    if half_width is not None and state.precision == "fp32":
        tolerances["du/dt"] = 2 * relative([truth(rounding, at)], [derivatives["exact"]]) + LOSS_TOLERANCE
    elif tolerance is None and half_width is None:
        tolerances["du/dt"] = difference_tolerance(state, wide, at, derivatives["exact"])
    # The step takes it along a guided velocity that the network rounds, from a forward of another size of batch.
    direction = 0.0
    if state.precision != "fp32":
        _, rounded = place(rounding, state, x0, y, draws)
        direction = relative([truth(wide, rounded)], [derivatives["exact"]])
    tolerances[IN_STEP] = 2 * (tolerances["du/dt"] + direction)
    errors = {"du/dt": relative([derivatives["found"]], [derivatives["exact"]])}

    taken: list[Tensor] = []

    def observe(name: str, **tensors: Any) -> None:
        if name == "target":
            with torch.no_grad():
                taken.append(tensors["derivative"].clone())

    calls, metrics = count_calls(recipe, state, x0, y, observe)
    wanted = recipe.network_calls(state.objective)
    faults = [] if calls == wanted else [f"calls the network {calls} times, not {wanted}"]
    if len(taken) != 1:
        faults.append(f"takes du/dt for its target {len(taken)} times, not once")
    errors[IN_STEP] = max((relative([du[-len(u) :]], [derivatives["exact"]]) for du in taken), default=math.inf)
    for name in ("loss", "fm_mse", "sc_mse"):
        errors[name] = relative([metrics[name]], [getattr(step, name)])
    errors["grad_norm"] = relative([metrics["grad_norm"]], [torch.stack([g.norm() for g in step.gradients]).norm()])
    if state.precision == "fp32":
        errors |= gradient_errors(state, step.gradients)
    else:
        errors["gradient"] = relative([gradient(p) for p in state.flow.parameters()], step.gradients)
    for name, right in moves(step.gradients, before, config).items():
        after = weights_of(state) if name == "flow" else list(state.ema.parameters())
        mine = [p.double() - p0 for p, p0 in zip(after, before, strict=True)]
        errors[f"update of {name}"] = relative(mine, right)
    if state.precision == "fp32":
        fixed = {name: LOSS_TOLERANCE if name.endswith(("mse", "loss")) else GRADIENT_TOLERANCE for name in errors}
        tolerances = fixed | tolerances
    return require(f"{recipe.name} in {precision} against float64", errors, tolerances, faults)


@torch.no_grad()
def derivative_of(network: PlainNetwork, at: At, half_width: float | None = None) -> Tensor:
    """du/dt: of a float64 network by a central difference, of one that rounds by torch.func.jvp. half_width: the
    central difference of this half-width, of either."""
    if half_width is not None or not network.precision:
        e = half_width or WIDE_STEP
        ends = [network(at.z + h * at.v, at.t + h, at.r, at.y) for h in (e, -e)]
        return (ends[0] - ends[1]) / (2 * e)
    stance = torch.compiler.set_stance("force_eager")
    with stance, plain_operations(), matmul_precision(network.precision, at.z.device):
        return jvp(network.inner, single(at))[1].double()


def measured(exact: Exact, right: Exact, n: int, before: list[Tensor], config: Config) -> dict[str, float]:
    """The errors that rounding makes in the figures of a right step, relative; n: how many samples have r = t.

    A sample's loss moves by no more than its square does.
    """

    def squares(part: slice) -> float:
        return error_of_square(relative([right.residual[part]], [exact.residual[part]]))

    found = {"fm_mse": squares(slice(n)), "sc_mse": squares(slice(n, None))}
    found["loss"] = max(squares(slice(k, k + 1)) for k in range(len(exact.residual)))
    found["gradient"] = found["grad_norm"] = relative(right.gradients, exact.gradients)
    theirs, mine = (moves(step.gradients, before, config) for step in (right, exact))
    return found | {f"update of {name}": relative(theirs[name], mine[name]) for name in mine}


def moves(gradients: list[Tensor], weights: list[Tensor], config: Config) -> dict[str, list[Tensor]]:
    """How far weights and averages go: AdamW's first step, whose corrected averages are gradient and its square."""
    optim = config.optim
    directions = [g / (g.abs() + optim.eps) for g in gradients]
    flow = [-optim.lr * (d + optim.weight_decay * p) for d, p in zip(directions, weights, strict=True)]
    return {"flow": flow, "ema": [(1 - optim.ema_decay) * move for move in flow]}


@torch.no_grad()
def found_at(state: TrainState, at: At, derivative: Derivative) -> Tensor:
    """The recipe's du/dt in the precision of the state, beside the student's forward there."""
    at, tape = single(at), TapedOutputs(slice(None))
    with plain_operations(), matmul_precision(state.precision, state.device):
        with torch.compiler.set_stance("force_eager"):
            output = state.flow.network(at.z, at.t, at.r, at.y, tape=tape).float()
        return derivative(state, at, Student(output, tape)).double()


@torch.no_grad()
def difference_tolerance(state: TrainState, wide: PlainNetwork, at: At, exact: Tensor) -> float:
    """The error that a finite difference of float32 forwards may have: its truncation, which the same difference in
    float64 shows, and the float32 error of the very forwards behind it, over the distance of the two."""
    rounding, near = PlainNetwork(widened(state, torch.float32), "fp32"), single(at)
    ends, error = [], torch.zeros((), dtype=torch.float64, device=state.device)
    for h in (0.0, -STEP) if one_sided(state) else (STEP, -STEP):
        ends.append(wide(at.z + h * at.v, at.t + h, at.r, at.y))
        # In float32 the end itself is rounded as well.
        error += (rounding(near.z + h * near.v, near.t + h, near.r, near.y) - ends[-1]).norm()
    distance = STEP if one_sided(state) else 2 * STEP
    truncation = relative([(ends[0] - ends[1]) / distance], [exact])
    found = truncation + float(error / (distance * exact.norm())) + LOSS_TOLERANCE
    if not found <= ROUNDING_LIMIT:
        raise IncorrectResult(
            f"a finite difference by {STEP} may err by {found:.1e} on this network, which hides all else"
        )
    return found


def widened(state: TrainState, dtype: torch.dtype = torch.float64) -> DiT:
    """The network of a state in another dtype that holds its parameters exactly, those in bf16 as they are rounded."""
    flow = initial_flow(state.config, state.device, dtype)
    flow.load_state_dict(state.flow.state_dict())
    return flow.network


def single(at: At) -> At:
    """In float32, labels as they are."""
    return At(*(value.float() if value.is_floating_point() else value for value in at))


def point(x0: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """z_t = (1 - t) x + t e and v = e - x in float64."""
    x, e, t = x0.double(), draws.x1.double(), draws.t.double()[:, None, None, None]
    return (1 - t) * x + t * e, e - x


@torch.no_grad()
def guided_velocity(network: PlainNetwork, state: TrainState, z: Tensor, v: Tensor, y: Tensor, draws: Draws) -> Tensor:
    """v~ of the whole batch."""
    c, t = state.objective.config, draws.t.double()
    w, m = c.guidance_scale, c.mix_ratio
    if w <= 1:
        return v
    u_null, u_label = network(z, t, t, None), network(z, t, t, y)
    omega, kappa = m * w, 1 - m
    target = omega * v + kappa * u_label + (1 - omega - kappa) * u_null
    plain = draws.label_dropped | (draws.t > c.guidance_decay_time)
    return torch.stack([a if left else b for a, b, left in zip(v, target, plain, strict=True)])


def labels(network: PlainNetwork, y: Tensor, draws: Draws) -> Tensor:
    """The labels that the network sees."""
    return y.masked_fill(draws.label_dropped, network.inner.num_classes)


@torch.no_grad()
def place(network: PlainNetwork, state: TrainState, x0: Tensor, y: Tensor, draws: Draws) -> tuple[Tensor, At]:
    """u(z, r, t), and where it is taken, of the samples with r != t."""
    z, v = point(x0, draws)
    v, label = guided_velocity(network, state, z, v, y, draws), labels(network, y, draws)
    late = slice(draws.n_equal, None)
    at = At(z[late], draws.t[late].double(), draws.r[late].double(), label[late], v[late])
    return network(at.z, at.t, at.r, at.y), at


def whole_step(
    network: PlainNetwork,
    state: TrainState,
    x0: Tensor,
    y: Tensor,
    draws: Draws,
    settings: Settings,
    derivative: Callable[[At], Tensor],
) -> Exact:
    """The formulas of `meanflow`, sample by sample, in float64 around a network. derivative: du/dt where r != t."""
    n = draws.n_equal
    z, v = point(x0, draws)
    v, label = guided_velocity(network, state, z, v, y, draws), labels(network, y, draws)
    t, r = draws.t.double(), draws.r.double()
    du = torch.cat([torch.zeros_like(v[:n]), derivative(At(z[n:], t[n:], r[n:], label[n:], v[n:]))])
    u = network(z, t, r, label)
    losses, means, residuals = [], [], []
    for i in range(len(z)):
        residual = u[i] - (v[i] - (t[i] - r[i]) * du[i])
        square = residual.square().sum()
        losses.append(square / (square.detach() + settings.eps) ** settings.p)
        means.append(residual.detach().square().mean())
        residuals.append(residual.detach())
    loss = torch.stack(losses).mean()
    gradients = [g.double() for g in gradients_of(loss, network.inner)]
    fm_mse, sc_mse = torch.stack(means[:n]).mean(), torch.stack(means[n:]).mean()
    return Exact(torch.stack(residuals), loss.detach(), fm_mse, sc_mse, gradients)
