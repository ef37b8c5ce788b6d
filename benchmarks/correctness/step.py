"""The correctness check: before a baseline is timed it computes what the engine computes, or there is no timing.

From the same weights, batch and draws, in float32: losses, the gradient of every parameter, the gradient's norm, the
updated weights, their EMA, and how often each recipe calls the network. Then losses and gradients once more, in the
precision that is timed: within twice of what rounding makes of the same formulas around the same network.
"""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.correctness.comparison import (
    BATCH,
    CHANGES,
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    ROUNDING_LIMIT,
    STORED,
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
from benchmarks.harness.recipes import OURS, Recipe, build, initial_flow, plain_operations
from soflow_fast.config.schema import Config, override
from soflow_fast.flow import SolutionFlow, per_sample
from soflow_fast.training.precision import backward_precision, matmul_precision, resolve_device, resolve_precision
from soflow_fast.training.state import TrainState
from soflow_fast.training.step import draw
from soflow_kernels import consistency_loss, euler_lookahead, flow_matching_loss

LOW_TOLERANCE = 5e-2
"""Tolerance of bf16 against float32: a product's result is off by 0.4 %, a small network's output by some per cent."""
FLOAT8_TOLERANCE = 0.3
"""Tolerance of float8. e4m3 rounds an operand by up to 2^-4, by 0.036 as root mean square, and e5m2 by 0.072: 0.08 to
0.1 for each product of a backward, and a gradient has come through several of them."""


def check(config: Config, baseline: Recipe, ours: Recipe = OURS) -> dict[str, float]:
    """Compare one update of both recipes on the network of `config`; returns the relative errors by name.

    A recipe that records its steps makes several; then the gradients are those of the last one. One that multiplies in
    float8 cannot be held to float32: it is compared with our step in bf16, within what rounding to 3 bits leaves; any
    other passes `check_timed` as well. Raises IncorrectResult naming all that differs.
    """
    coarse, given = baseline.coarse, config
    timed = {} if coarse else check_timed(config, baseline)
    precision = "fp32" if coarse else resolve_precision(config.precision, resolve_device(config.run.device))
    states, metrics, faults = [], [], []
    with formulas_alone(baseline, precision) as formulas:
        batch = given.batch_size if formulas.compiled else min(BATCH, given.batch_size)
        config = override(given, CHANGES | {"batch_size": batch})
        for recipe in (ours, formulas):
            state = build(recipe, replace(config, precision="bf16") if coarse else config)
            x0, y = random_batch(config, state.device)
            calls, result = count_calls(recipe, state, x0, y)
            wanted = recipe.network_calls(state.objective)
            if calls != wanted and not coarse:
                faults.append(f"{recipe.name} calls the network {calls} times, not {wanted}")
            for _ in range(baseline.checked_steps - 1):
                result = recipe.step(state, x0, y)
            states.append(state)
            metrics.append(result)

    mine, theirs = states
    errors = {}
    for name in ("fm_mse", "sc_mse", "grad_norm"):
        errors[name] = relative([metrics[0][name]], [metrics[1][name]])
    if baseline.checked_steps == 1:  # a recording keeps its gradients to itself
        errors |= gradient_errors(mine, [gradient(p) for p in theirs.flow.parameters()])
    before = [p.detach() for p in initial_flow(config, mine.device).parameters()]
    for name in ("flow", "ema"):
        after = [weights_of(s) if name == "flow" else list(s.ema.parameters()) for s in states]
        moves = [[p - p0 for p, p0 in zip(weights, before, strict=True)] for weights in after]
        errors[f"update of {name}"] = relative(*moves)
    if coarse:
        tolerances = {name: FLOAT8_TOLERANCE for name in errors}
    else:
        tolerances = {name: LOSS_TOLERANCE if name.endswith("_mse") else GRADIENT_TOLERANCE for name in errors}
    return require(f"{baseline.name} against {ours.name}", errors, tolerances, faults) | timed


class Exact(NamedTuple):
    """A step in float64 around a network: delta of the flow matching, q of the consistency samples, gradients."""

    fm: Tensor
    sc: Tensor
    gradients: list[Tensor]


def check_timed(config: Config, recipe: Recipe) -> dict[str, float]:
    """Hold losses and gradients of one step in the configuration's own precision to the formulas in float64 around the
    network in float32; returns the relative errors by name. Empty where that precision is float32.

    A tolerance is twice the error of these formulas around the network as it rounds, the increment from a plain pair of
    forwards, which the slowest recipe takes. The look-ahead is a long one: a pair's rounding grows as 1/r.
    Raises IncorrectResult naming what differs by more, or what rounds so much that nothing would show.
    """
    batch = config.batch_size if recipe.compiled else min(BATCH, config.batch_size)
    held = {"batch_size": batch, "optim.lr": 1e-12, "objective.r_init": 0.5}  # weights that stay, for several steps
    config = override(config, {**CHANGES, "precision": config.precision, **held})
    if resolve_precision(config.precision, resolve_device(config.run.device)) == "fp32":
        return {}
    state = build(recipe, config)
    precision = state.precision
    if precision == "fp32":
        return {}
    x0, y = random_batch(config, state.device)
    state.step = recipe.checked_steps - 1
    network = initial_flow(config, state.device).network
    exact, right = (whole_step(PlainNetwork(network, p), state, x0, y) for p in ("fp32", precision))
    state.step = 0
    rounding = {name: relative([getattr(right, name)], [getattr(exact, name)]) for name in ("fm", "sc")}
    rounding["gradient"] = relative(right.gradients, exact.gradients)
    metrics: dict[str, Tensor] = {}
    for _ in range(recipe.checked_steps):
        metrics = recipe.step(state, x0, y)
    errors, tolerances = {}, {}
    for name, wanted in (("fm", exact.fm), ("sc", exact.sc)):
        errors[f"{name}_mse"] = relative([metrics[f"{name}_mse"]], [wanted.square().mean()])
        tolerances[f"{name}_mse"] = 2 * error_of_square(rounding[name]) + LOSS_TOLERANCE
    norm = torch.stack([g.norm() for g in exact.gradients]).norm()
    errors["grad_norm"] = relative([metrics["grad_norm"]], [norm])
    if recipe.checked_steps == 1:  # a recording keeps its gradients to itself
        errors["gradient"] = relative([gradient(p) for p in state.flow.parameters()], exact.gradients)
    stored = STORED if any(p.dtype.itemsize == 2 for p in state.flow.parameters()) else 0.0
    tolerances["grad_norm"] = 2 * rounding["gradient"] + GRADIENT_TOLERANCE
    tolerances["gradient"] = 2 * math.hypot(rounding["gradient"], stored) + GRADIENT_TOLERANCE
    what = f"{recipe.name} in {precision} against float32"
    faults = [f"{name} is rounding by {e:.1e}" for name, e in rounding.items() if not e <= ROUNDING_LIMIT]
    return {f"{name} in {precision}": error for name, error in require(what, errors, tolerances, faults).items()}


def whole_step(network: PlainNetwork, state: TrainState, x0: Tensor, y: Tensor) -> Exact:
    """SoFlow's losses on the next step's draws, one after the other, the look-ahead by a forward of its own."""
    c, path = state.config.objective, state.config.flow
    guidance = {name: getattr(c, name) for name in ("guidance_scale", "guidance_decay_time", "mix_ratio")}
    flow = SolutionFlow(network, path.path, path.coefficients)
    draws = draw(state, x0.shape)
    n, B = draws.n_fm, len(x0)
    x1, t, l, s = (value.double() for value in draws[:4])
    dropped = draws.label_dropped
    fm, sc = slice(n), slice(n, None)
    with plain_operations():
        x_t, v_t = flow.point(x0.double(), x1, t)
        label = y.masked_fill(dropped, flow.network.num_classes)
        output = flow.network(x_t, t, s, label)
        with torch.no_grad():
            v_null = flow.velocity(x_t, t) if c.guidance_scale > 1 else None
            v_label = flow.velocity(x_t, t, label) if c.guidance_scale > 1 and c.mix_ratio < 1 else None
            target, _, x_l = euler_lookahead(x_t, v_t, t, l, v_null, v_label, dropped, **guidance)
            end = flow.network(x_l, l, s, label)
            delta = flow.to_velocity(output[fm]) - target[fm]
            solutions = flow.to_solution(output, x_t, t, s), flow.to_solution(end, x_l, l, s)
            q = (solutions[0] - solutions[1])[sc] / per_sample(t - l, x_t)[sc]
        null = None if v_null is None else v_null[fm]
        slope = flow.velocity_slope
        first = flow_matching_loss(
            output[fm], v_t[fm], t[fm], null, dropped[fm], **guidance, p=c.p, eps=c.eps, velocity_slope=slope
        )
        late = [value[sc] for value in (output, end - output.detach(), x_t, target, t, l, s)]
        second = consistency_loss(*late, p=c.p, eps=c.eps, coefficients=flow.coefficients)
        loss = first[0] * (n / B) + second[0] * ((B - n) / B)
        with backward_precision(network.precision or "fp32", x0.device):
            gradients = gradients_of(loss, network.inner)
    return Exact(delta, q, gradients)


def check_precision(config: Config, recipe: Recipe = OURS) -> dict[str, float]:
    """Compare one update of a recipe in the configuration's own precision with itself in float32, which `check` has
    compared with others; returns the relative errors of the losses and of the increments behind the quotient, and
    1 - cosine of the gradients. Empty in float32.

    Raises IncorrectResult naming what differs by more than rounding does.
    """
    config = override(config, {name: value for name, value in CHANGES.items() if "precision" not in name})
    config = override(config, {"batch_size": min(BATCH, config.batch_size)})
    low = build(recipe, config)
    if low.precision == "fp32":
        return {}
    targets: list[dict[str, Any]] = []

    def observe(name: str, **tensors: Any) -> None:
        if name == "target":
            targets.append(tensors)

    metrics = [recipe.step(low, *random_batch(config, low.device), observe=observe)]
    single = build(recipe, replace(config, precision="fp32"))
    network = single.flow.network
    with torch.no_grad(), matmul_precision("fp32", single.device):
        points = [target["points"] for target in targets]
        exact = [network(at.x_l, at.l, at.s, at.y) - network(at.x, at.t, at.s, at.y) for at in points]
    metrics.append(recipe.step(single, *random_batch(config, single.device)))
    errors = {name: relative([metrics[0][name]], [metrics[1][name]]) for name in ("fm_mse", "sc_mse")}
    a, b = (torch.cat([gradient(p).double().flatten() for p in state.flow.parameters()]) for state in (low, single))
    errors |= {"increments": relative([target["increment"] for target in targets], exact)} if targets else {}
    errors["direction of the gradient"] = 1 - float(torch.cosine_similarity(a, b, dim=0))
    what = f"{recipe.name} in {low.precision} against float32"
    return require(what, errors, dict.fromkeys(errors, LOW_TOLERANCE), [])
