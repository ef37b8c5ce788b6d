"""The correctness gate: before a baseline is timed it computes what the engine computes, or there is no timing.

From the same weights, batch and draws, in float32: losses, the gradient of every parameter, the gradient's norm, the
updated weights, their EMA, and how often each recipe calls the network. Then losses and gradients once more, in the
precision that is timed: within twice of what rounding makes of the same formulas around the same network.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.recipes import OURS, Recipe, build, plain_operations
from soflow_fast.config.schema import Config, override
from soflow_fast.flow import SolutionFlow
from soflow_fast.objective import with_null
from soflow_fast.rng import generator
from soflow_fast.training import consistency_target as quotient
from soflow_fast.training import step
from soflow_fast.training.state import TrainState, resolve_device, resolve_precision

LOSS_TOLERANCE = 2e-4
GRADIENT_TOLERANCE = 5e-4
LOW_TOLERANCE = 5e-2
"""Of bf16 against float32: a product's result is off by 0.4 %, a small network's output by some per cent."""
FLOAT8_TOLERANCE = 0.3
"""e4m3 rounds an operand by up to 2^-4, by 0.036 as root mean square, and e5m2 by 0.072: 0.08 to 0.1 for each product
of a backward, and a gradient has come through several of them."""
ROUNDING_LIMIT = 0.1
"""What rounding may make of a quantity whose tolerance is measured: one that is wrong, or missing, is off by more."""
BATCH = 8

# One update that shows an error: eps of 1 keeps AdamW's first step smooth in the gradient (its usual first step is the
# gradient's sign), the EMA moves as far as the weights do, and labels are dropped often even in a
# small batch.
CHANGES = {
    "precision": "fp32",
    "quotient": "auto",
    "quotient_precision": "auto",
    "optim.lr": 1.0,
    "optim.eps": 1.0,
    "optim.warmup_steps": 0,
    "optim.ema_decay": 0.5,
    "objective.label_drop": 0.3,
}


class RedGate(Exception):
    """A baseline does not compute what the engine computes."""


def check(config: Config, baseline: Recipe, ours: Recipe = OURS) -> dict[str, float]:
    """Compare one update of both recipes on the network of `config`; returns the relative errors by name.

    A recipe that records its steps makes several; then the gradients are those of the last one. One that multiplies in
    float8 cannot be held to float32: it is compared with our step in bf16, within what rounding to 3 bits leaves; any
    other passes `check_timed` as well. Raises RedGate naming all that differs.
    """
    timed = {} if baseline.coarse else check_timed(config, baseline)
    batch = config.batch_size if baseline.compiled else min(BATCH, config.batch_size)
    config = override(config, CHANGES | {"batch_size": batch})
    coarse = baseline.coarse
    states, metrics, faults = [], [], []
    for recipe in (ours, baseline):
        state = build(recipe, replace(config, precision="bf16") if coarse else config)
        x0, y = random_batch(config, state.device)
        calls, result = count_calls(recipe, state, x0, y)
        wanted = recipe.network_calls(state.objective)
        if calls != wanted and not coarse:
            faults.append(f"{recipe.name} calls the network {calls} times, not {wanted}")
        for _ in range(baseline.gate_steps - 1):
            result = recipe.step(state, x0, y)
        states.append(state)
        metrics.append(result)

    mine, theirs = states
    errors = {}
    for name in ("fm_mse", "sc_mse", "grad_norm"):
        errors[name] = relative([metrics[0][name]], [metrics[1][name]])
    if baseline.gate_steps == 1:  # a recording keeps its gradients to itself
        errors |= compare_gradients(mine, [gradient(p) for p in theirs.flow.parameters()])
    before = [p.detach() for p in build(ours, config).flow.parameters()]
    for name in ("flow", "ema"):
        moves = [[p.detach() - p0 for p, p0 in zip(getattr(s, name).parameters(), before, strict=True)] for s in states]
        errors[f"update of {name}"] = relative(*moves)
    if coarse:
        tolerances = {name: FLOAT8_TOLERANCE for name in errors}
    else:
        tolerances = {name: LOSS_TOLERANCE if name.endswith("_mse") else GRADIENT_TOLERANCE for name in errors}
    return judge(f"{baseline.name} against {ours.name}", errors, tolerances, faults) | timed


class Rounding(torch.nn.Module):
    """A network from float64 to float64 by plain operations, whose products are in a precision ("": float64)."""

    def __init__(self, inner: Any, precision: str = "") -> None:
        super().__init__()
        self.inner, self.precision, self.num_classes = inner, precision, inner.num_classes

    def forward(self, x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        with torch.compiler.set_stance("force_eager"), plain_operations():
            if not self.precision:
                return self.inner(x, t, s, y)
            with quotient.products(self.precision, x.device):
                return self.inner(x.float(), t.float(), s.float(), y).double()


class Exact(NamedTuple):
    """A step in float64 around a network: delta of the flow matching, q of the consistency samples, gradients."""

    fm: Tensor
    sc: Tensor
    gradients: list[Tensor]


def check_timed(config: Config, recipe: Recipe) -> dict[str, float]:
    """Hold losses and gradients of one step in the configuration's own precision to the formulas in float64 around the
    network in float32; returns the relative errors by name. Empty where that precision is float32.

    A tolerance is twice the error of these formulas around the network as it rounds, the quotient from a plain pair of
    forwards, which the slowest recipe takes. The look-ahead is a long one: a pair's rounding grows as 1/r.
    Raises RedGate naming what differs by more, or what rounds so much that nothing would show.
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
    state.step = recipe.gate_steps - 1
    exact, right = (whole_step(Rounding(state.flow.network, p), state, x0, y) for p in ("fp32", precision))
    state.step = 0
    rounding = {name: relative([getattr(right, name)], [getattr(exact, name)]) for name in ("fm", "sc")}
    rounding["gradient"] = relative(right.gradients, exact.gradients)
    metrics: dict[str, Tensor] = {}
    for _ in range(recipe.gate_steps):
        metrics = recipe.step(state, x0, y)
    errors, tolerances = {}, {}
    for name, wanted in (("fm", exact.fm), ("sc", exact.sc)):
        errors[f"{name}_mse"] = relative([metrics[f"{name}_mse"]], [wanted.square().mean()])
        tolerances[f"{name}_mse"] = 2 * of_square(rounding[name]) + LOSS_TOLERANCE
    norm = torch.stack([g.norm() for g in exact.gradients]).norm()
    errors["grad_norm"] = relative([metrics["grad_norm"]], [norm])
    if recipe.gate_steps == 1:  # a recording keeps its gradients to itself
        errors["gradient"] = relative([gradient(p) for p in state.flow.parameters()], exact.gradients)
    tolerances["gradient"] = tolerances["grad_norm"] = 2 * rounding["gradient"] + GRADIENT_TOLERANCE
    what = f"{recipe.name} in {precision} against float32"
    faults = [f"{name} is rounding by {e:.1e}" for name, e in rounding.items() if not e <= ROUNDING_LIMIT]
    return {f"{name} in {precision}": error for name, error in judge(what, errors, tolerances, faults).items()}


def of_square(e: float) -> float:
    """What a relative error e of a vector can make of its square: ||a|^2 - |b|^2| <= (2 e + e^2) |b|^2. The error that
    a square happens to have may be less, where parts of it cancel."""
    return 2 * e + e * e


def whole_step(network: Rounding, state: TrainState, x0: Tensor, y: Tensor) -> Exact:
    """SoFlow's losses on the next step's draws, one after the other, the look-ahead by a forward of its own."""
    objective, path = state.objective, state.config.flow
    flow = SolutionFlow(network, path.path, path.coefficients)
    draws = step.draw(state, x0.shape)
    n, B = draws.n_fm, len(x0)
    x1, t, l, s = (value.double() for value in draws[:4])
    with plain_operations():
        x_t, v_t = flow.point(x0.double(), x1, t)
        label = with_null(flow, y, draws.label_dropped)
        output = flow.network(x_t, t, s, label)
        with torch.no_grad():
            v_null = flow.velocity(x_t, t) if objective.guided else None
            v_label = flow.velocity(x_t, t, label) if objective.mixed else None
            target, _, x_l = objective.look_ahead(x_t, v_t, t, l, v_null, v_label, draws.label_dropped)
            increment = flow.network(x_l, l, s, label) - output
        fm = flow.to_velocity(output[:n]) - target[:n]
        late = [v[n:] for v in (output, output.detach(), increment, x_t, target, t, l, s)]
        q = objective.quotient(flow, *late[1:])
        null = None if v_null is None else v_null[:n]
        first = objective.flow_matching_term(flow, output[:n], v_t[:n], t[:n], null, draws.label_dropped[:n])
        loss = first.loss * (n / B) + objective.consistency_term(flow, *late).loss * ((B - n) / B)
    parameters = list(network.inner.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    gradients = [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]
    return Exact(fm.detach(), q, gradients)


def compare_gradients(state: TrainState, others: list[Tensor]) -> dict[str, float]:
    """The relative error of the gradients as a whole, and that of the worst parameter."""
    mine = [gradient(p) for p in state.flow.parameters()]
    names = [name for name, _ in state.flow.named_parameters()]
    each = {f"gradient of {n}": relative([a], [b]) for n, a, b in zip(names, mine, others, strict=True)}
    worst = max(each, key=lambda name: each[name])
    return {"gradient": relative(mine, others), worst: each[worst]}


def judge(what: str, errors: dict[str, float], tolerances: dict[str, float], faults: list[str]) -> dict[str, float]:
    """The errors. Raises RedGate naming the faults and all errors above their tolerance."""
    faults = [*faults]
    for name, error in errors.items():
        if not error <= tolerances[name]:  # also when it is NaN
            faults.append(f"{name}: relative error {error:.1e} above {tolerances[name]:.0e}")
    if faults:
        raise RedGate(f"{what}: " + "; ".join(faults))
    return errors


def check_precision(config: Config, recipe: Recipe = OURS) -> dict[str, float]:
    """Compare one update of a recipe in the configuration's own precision with itself in float32, which `check` has
    compared with others; returns the relative errors of the losses and of the increments behind the quotient, and
    1 - cosine of the gradients. Empty in float32.

    Raises RedGate naming what differs by more than rounding does.
    """
    config = override(config, {name: value for name, value in CHANGES.items() if "precision" not in name})
    config = override(config, {"batch_size": min(BATCH, config.batch_size)})
    if recipe.build(config).precision == "fp32":
        return {}
    states, metrics, increments = [], [], []
    plain = step.value_and_increment

    def noted(how: quotient.Quotient, flow: SolutionFlow, teacher: SolutionFlow | None, at: quotient.Ends, *rest: Any):
        found = plain(how, flow, teacher, at, *rest)
        exact = plain(quotient.Quotient("pair", "fp32", how.teacher), flow, teacher, at, None)
        increments.append((found[1], exact[1]))
        return found

    for precision in (config.precision, "fp32"):
        state = build(recipe, override(config, {"precision": precision}))
        step.value_and_increment = noted if not states else plain
        try:
            metrics.append(recipe.step(state, *random_batch(config, state.device)))
        finally:
            step.value_and_increment = plain
        states.append(state)
    errors = {name: relative([metrics[0][name]], [metrics[1][name]]) for name in ("fm_mse", "sc_mse")}
    low, exact = (torch.cat([gradient(p).double().flatten() for p in state.flow.parameters()]) for state in states)
    errors |= {"increments": relative(*zip(*increments, strict=True))} if increments else {}
    errors["direction of the gradient"] = 1 - float(torch.cosine_similarity(low, exact, dim=0))
    faults = [f"{name}: {error:.1e}" for name, error in errors.items() if not error <= LOW_TOLERANCE]
    if faults:
        raise RedGate(f"{recipe.name} in {states[0].precision} against float32: " + "; ".join(faults))
    return errors


def random_batch(config: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """Normal images and uniform labels for the network of `config`, the same on every device."""
    model = config.model
    source = generator(config.seed, 0, 0, "benchmark batch")
    x0 = torch.randn(config.batch_size, model.in_channels, model.input_size, model.input_size, generator=source)
    y = torch.randint(model.num_classes, (config.batch_size,), generator=source)
    return x0.to(device), y.to(device)


def count_calls(recipe: Recipe, state: TrainState, x0: Tensor, y: Tensor) -> tuple[int, dict[str, Tensor]]:
    """How often one step calls the network, a pass of increments included, and the step's metrics."""
    calls = []
    plain = quotient.paired_forward

    def paired(*arguments, **named):
        calls.append(len(arguments[1]))
        return plain(*arguments, **named)

    quotient.paired_forward = paired
    # The embedding of the patches, for a JVP that goes through the blocks one by one calls the network too.
    embed = state.flow.network.x_embedder
    hook = embed.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    try:
        metrics = recipe.step(state, x0, y)
    finally:
        hook.remove()
        quotient.paired_forward = plain
    return len(calls), metrics


def gradient(parameter: torch.nn.Parameter) -> Tensor:
    """The gradient, zero where there is none."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def relative(a: Iterable[Tensor], b: Iterable[Tensor]) -> float:
    """|a - b| / |b| over lists of tensors, in float64; 0 where both are zero."""
    error = size = 0.0
    for x, y in zip(a, b, strict=True):
        error += float((x.double() - y.double()).square().sum())
        size += float(y.double().square().sum())
    return math.sqrt(error / size) if size else math.sqrt(error)
