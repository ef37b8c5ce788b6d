"""Comparisons of one training step with another: the update they are made on, relative errors, network calls."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.recipes import Observe, Recipe, plain_operations
from soflow_fast.models.dit import DiT
from soflow_fast.training.precision import matmul_precision
from soflow_fast.training.state import TrainState

LOSS_TOLERANCE = 2e-4
GRADIENT_TOLERANCE = 5e-4
STORED = 2**0.5 * 1.63e-3
"""Root mean square of what bf16 rounds off gradients that are kept in it, twice: one part, and its sum with another. No
batch makes it less."""
ROUNDING_LIMIT = 0.1
"""The most that rounding may make of a quantity whose tolerance is measured: a wrong or missing one is off by more."""
BATCH = 8
"""The largest batch of a check, unless code is compiled for another."""

# One update that shows an error: eps of 1 keeps AdamW's first step smooth in the gradient (its usual first step is the
# gradient's sign), the average moves as far as the weights do, and labels are dropped often even in a small batch.
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


class IncorrectResult(Exception):
    """A way does not compute what it should: it is not timed."""


class PlainNetwork(torch.nn.Module):
    """A network from float64 to float64 by plain operations, whose products are in a precision ("": float64)."""

    def __init__(self, inner: Any, precision: str = "") -> None:
        super().__init__()
        self.inner, self.precision, self.num_classes = inner, precision, inner.num_classes

    def forward(self, x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        with torch.compiler.set_stance("force_eager"), plain_operations():
            if not self.precision:
                return self.inner(x, t, s, y)
            with matmul_precision(self.precision, x.device):
                return self.inner(x.float(), t.float(), s.float(), y).double()


class CountingDiT(DiT):
    """A DiT that counts its passes: forwards and those of value and increment, both of which check their input. Its
    forward is the DiT's own, as another one would keep a step from taking increments."""

    calls: int

    def check_input(self, *inputs: Any) -> None:
        self.calls += 1
        super().check_input(*inputs)


@contextmanager
def formulas_alone(recipe: Recipe, precision: str) -> Iterator[Recipe]:
    """The recipe as it is to be checked in float32. Where another precision is timed, whose code is checked as such, it
    is not compiled within the context: compiling takes most of a check, and here the formulas are what is seen."""
    if not recipe.compiled or precision == "fp32":
        yield recipe
        return
    with torch.compiler.set_stance("force_eager"):
        yield recipe._replace(compiled=False)


def relative(a: Iterable[Tensor], b: Iterable[Tensor]) -> float:
    """|a - b| / |b| over lists of tensors, in float64; 0 where both are zero."""
    error = size = 0.0
    for x, y in zip(a, b, strict=True):
        error += float((x.double() - y.double()).square().sum())
        size += float(y.double().square().sum())
    return math.sqrt(error / size) if size else math.sqrt(error)


def error_of_square(e: float) -> float:
    """The most that a relative error e of a vector can make of its square: ||a|^2 - |b|^2| <= (2 e + e^2) |b|^2. The
    error that a square happens to have may be less, where parts of it cancel."""
    return 2 * e + e * e


def gradient(parameter: torch.nn.Parameter) -> Tensor:
    """The gradient, zero where there is none."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def weights_of(state: TrainState) -> list[Tensor]:
    """The network's weights in float32: those that the optimiser updates."""
    return [p.detach() for p in getattr(state.optimizer, "masters", state.flow.parameters())]


def gradients_of(loss: Tensor, network: torch.nn.Module) -> list[Tensor]:
    """The gradient of a loss for each of a network's parameters, zero where there is none."""
    parameters = list(network.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


def gradient_errors(state: TrainState, others: list[Tensor]) -> dict[str, float]:
    """The relative error of the gradients as a whole, and that of the worst parameter."""
    mine = [gradient(p) for p in state.flow.parameters()]
    names = [name for name, _ in state.flow.named_parameters()]
    each = {f"gradient of {n}": relative([a], [b]) for n, a, b in zip(names, mine, others, strict=True)}
    worst = max(each, key=lambda name: each[name])
    return {"gradient": relative(mine, others), worst: each[worst]}


def require(what: str, errors: dict[str, float], tolerances: dict[str, float], faults: list[str]) -> dict[str, float]:
    """The errors. Raises IncorrectResult naming the faults and all errors above their tolerance."""
    faults = [*faults]
    for name, error in errors.items():
        if not error <= tolerances[name]:  # also when it is NaN
            faults.append(f"{name}: relative error {error:.1e} above {tolerances[name]:.0e}")
    if faults:
        raise IncorrectResult(f"{what}: " + "; ".join(faults))
    return errors


def count_calls(
    recipe: Recipe, state: TrainState, x0: Tensor, y: Tensor, also: Observe | None = None
) -> tuple[int, dict[str, Tensor]]:
    """The network calls of one step, a pass of increments or tangents included, and the step's metrics. also: is told
    what the step computes on the way."""
    flows = [flow for flow in (state.flow, state.guide) if flow is not None]  # the guide's layers may be another's
    networks, counting = [flow.network for flow in flows], []
    for network in networks:
        counting.append(CountingDiT.__new__(CountingDiT))
        counting[-1].__dict__.update(network.__dict__, calls=0)  # the same layers, so that the step runs as it is timed
    passes, at_student = 0, -1

    def observe(name: str, **tensors: Any) -> None:
        nonlocal passes, at_student
        calls = counting[0].calls
        if also is not None:
            also(name, **tensors)
        if name == "student":
            at_student = calls
        elif name == "target" and calls == at_student:  # an increment from no call of the network: a pass beside one
            passes += 1

    for flow, counted in zip(flows, counting, strict=True):
        flow.network = counted
    try:
        metrics = recipe.step(state, x0, y, observe=observe)
    finally:
        for flow, network in zip(flows, networks, strict=True):
            flow.network = network
    return sum(counted.calls for counted in counting) + passes, metrics
