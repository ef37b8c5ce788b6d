"""MeanFlow (Geng et al. 2025, arXiv 2505.13447): the one-step objective that takes a Jacobian-vector product.

The network is the average velocity u(z, r, t) from t down to r: the engine's N(z, t, s) at s = r, which sees t and
t - r. With e noise and x data, z_t = (1 - t) x + t e and v = e - x:

    v~    = omega v + kappa u(z, t, t | c) + (1 - omega - kappa) u(z, t, t | null)      (guidance inside the target)
    u_tgt = v~ - (t - r) du/dt,  du/dt = (v~, 0, 1) . (d/dz, d/dr, d/dt) u(z, r, t | c)  (equation 10; no gradient)
    loss  = mean_i |u - u_tgt|^2 / (|u - u_tgt|^2 + eps)^p,  the denominator without gradient, |.|^2 a sum over a sample

v~ = v where the label was dropped, and for t beyond the interval in which there is guidance. A fixed share of the batch
has r = t (the first samples); elsewhere t and r are the larger and the smaller of two logit-normal times. The public
JAX code has these numbers: P_mean -0.4, P_std 1, 75 % with r = t, eps 0.01, p 1, labels dropped with probability 0.1.

omega and kappa follow from the engine's guidance: SoFlow's target m (v + (w - 1)(v - v_null)) + (1 - m) v_label is the
one above with omega = m w and kappa = 1 - m, of effective scale omega / (1 - kappa) = w; it ends at t_d, where the
engine's fades.

"As published" takes u and du/dt of the whole batch from one torch.func.jvp, whose primal is what is differentiated,
after two calls for guidance; torch's fused attention has no forward-mode derivative, so attention is composed of
products and a softmax. This is what ports of it to PyTorch do, three products for each linear layer included: the one
of the weight's tangent, which is zero, counts among its forwards per image as it is paid for.

The others are what the method comes to when nothing is wasted: du/dt only where r != t, without gradient; the student's
forward apart, with fused attention, on the whole batch; one call for guidance, which takes u(z, t, t | c) only where
r != t and finds it in the student's forward elsewhere. Their ways to du/dt: the tangents beside the values of the
student's forward (`dual`), with attention composed or by jvp_flash_attention, and a finite difference: in float32, or
in the step's own precision with both ends further apart, as TiM takes it.
"""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.baselines import dual, fused
from benchmarks.harness.recipes import Observe, Weights, plain_operations
from soflow_fast.config.schema import Config
from soflow_fast.flow import per_sample
from soflow_fast.models.dit import DiT, TapedOutputs
from soflow_fast.objective import Objective, with_null
from soflow_fast.rng import generator
from soflow_fast.training.precision import matmul_precision, resolve_device
from soflow_fast.training.state import TrainState
from soflow_fast.training.step import flow_matching_samples

STEP = 1e-3
"""h of the finite difference, in float32: where truncation, h/2 |d2u/dt2|, meets the forwards' rounding over h."""

HALF_WIDTH = 5e-3
"""TiM's half-width of a central difference."""


@dataclass(frozen=True)
class Settings:
    """The settings that are MeanFlow's own; the defaults are published."""

    time: tuple[float, float] | None = (-0.4, 1.0)
    """Mean and deviation of the logits of both times; None: t and r are drawn as the engine's t and s, and as many
    samples have r = t as take its flow-matching loss."""
    equal: float = 0.75
    """Share of samples with r = t."""
    p: float = 1.0
    eps: float = 0.01


class Draws(NamedTuple):
    """Everything random in one step's batch; the first `n_equal` samples have r = t."""

    x1: Tensor
    t: Tensor
    r: Tensor
    label_dropped: Tensor
    n_equal: int


class At(NamedTuple):
    """Where the derivative is taken: samples z [B, C, H, W], times [B], labels [B], the direction v of z."""

    z: Tensor
    t: Tensor
    r: Tensor
    y: Tensor
    v: Tensor


class Student(NamedTuple):
    """The student's forward at (z, r, t), without gradient."""

    output: Tensor
    tape: TapedOutputs | None
    """Its products, where the derivative wants them."""


Derivative = Callable[[TrainState, At, Student], Tensor]
"""(state, at, the student there) -> du/dt [B, C, H, W], without gradient."""


def draw(state: TrainState, shape: torch.Size, settings: Settings) -> Draws:
    """Noise, times and dropped labels of the next step."""
    config, objective, B = state.config, state.objective, shape[0]

    def source(purpose: str) -> torch.Generator:
        return generator(config.seed, state.step, 0, purpose, state.device)

    x1 = torch.randn(shape, generator=source("noise"), device=state.device)
    times = source("time")
    if settings.time is None:
        n = flow_matching_samples(B, config.objective.fm_fraction)
        t_equal = objective.flow_matching_times(n, times)
        t, r = objective.consistency_times(B - n, times)
        t, r = torch.cat([t_equal, t]), torch.cat([t_equal, r])
    else:
        n = flow_matching_samples(B, settings.equal)
        mean, deviation = settings.time
        both = torch.sigmoid(mean + deviation * torch.randn(2, B, generator=times, device=state.device))
        t, r = both.amax(0), both.amin(0)
        r[:n] = t[:n]
    dropped = torch.rand(B, generator=source("label drop"), device=state.device) < config.objective.label_drop
    return Draws(x1, t, r, dropped, n)


def guided(
    objective: Objective, v: Tensor, t: Tensor, dropped: Tensor, u_null: Tensor | None, u_label: Tensor | None
) -> Tensor:
    """v~ [B, C, H, W] of v and the network's velocities without and with label (None: kappa is 0)."""
    if u_null is None:
        return v
    c = objective.config
    omega, kappa = c.mix_ratio * c.guidance_scale, 1 - c.mix_ratio
    mixed = omega * v + (1 - omega - kappa) * u_null + (0 if u_label is None else kappa * u_label)
    return torch.where(per_sample(~dropped & (t <= c.guidance_decay_time), v) != 0, mixed, v)


def target(v: Tensor, t: Tensor, r: Tensor, derivative: Tensor) -> Tensor:
    """u_tgt [B, C, H, W] (equation 10)."""
    return v - per_sample(t - r, v) * derivative


def composed_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of q, k, v [B, heads, T, d] as products and a softmax, which have forward-mode derivatives."""
    return ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1) @ v


@contextmanager
def attending(network: DiT, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Within the context the blocks of the network take another attention of q, k, v [B, heads, T, d]."""
    before = network.blocks[0].attn.backend
    network.set_attention(function)
    try:
        yield
    finally:
        network.set_attention(before)


def jvp(
    network: DiT, at: At, attention: Callable[[Tensor, Tensor, Tensor], Tensor] = composed_attention
) -> tuple[Tensor, Tensor]:
    """u(z, r, t) and du/dt along (v, 0, 1), both with gradient where that is on. attention: one that has a
    forward-mode derivative."""
    with attending(network, attention):
        tangents = (at.v, torch.ones_like(at.t))
        return torch.func.jvp(lambda z, t: network(z, t, at.r, at.y), (at.z, at.t), tangents)[:2]


def by_tangents(
    state: TrainState, at: At, student: Student, *, compiled: bool = False, attention: dual.Attention | None = None
) -> Tensor:
    """The tangents beside the student's values. attention: of tangents, None: `dual.composed`."""
    assert student.tape is not None
    way = dual.compiled() if compiled else dual.EAGER
    ends = dual.Dual(at.z, at.v), at.t, at.r, at.y
    return dual.derivative(state.flow.network, *ends, student.tape, way, attention)


def by_difference(state: TrainState, at: At, student: Student) -> Tensor:
    """A finite difference in float32, as lower precision would drown it: against the student's value where that is
    float32, else central, both ends in one call."""
    network, dz = state.flow.network, STEP * at.v
    with matmul_precision("fp32", at.z.device):
        if one_sided(state):
            return (student.output - network(at.z - dz, at.t - STEP, at.r, at.y)) / STEP
        ends = (torch.cat([at.z + dz, at.z - dz]), torch.cat([at.t + STEP, at.t - STEP]), at.r.repeat(2))
        upper, lower = network(*ends, at.y.repeat(2)).chunk(2)
        return (upper - lower) / (2 * STEP)


def by_central_difference(state: TrainState, at: At, student: Student, *, half_width: float = HALF_WIDTH) -> Tensor:
    """TiM's derivative (arXiv 2509.04394): a central difference in the precision of the step, both ends in one call.

    Five times the half-width of `by_difference`, so that bf16 leaves some of it: docs/precision.md has how much.
    """
    network, dz = state.flow.network, half_width * at.v
    ends = (torch.cat([at.z + dz, at.z - dz]), torch.cat([at.t + half_width, at.t - half_width]), at.r.repeat(2))
    upper, lower = network(*ends, at.y.repeat(2)).float().chunk(2)
    return (upper - lower) / (2 * half_width)


def one_sided(state: TrainState) -> bool:
    """Whether the student's value is one end of the finite difference."""
    return state.precision == "fp32"


def losses_as_published(
    state: TrainState,
    x0: Tensor,
    y: Tensor,
    settings: Settings,
    observe: Observe | None = None,
    *,
    values_and_derivative: Callable[[DiT, At], tuple[Tensor, Tensor]] = jvp,
) -> dict[str, Tensor]:
    """u and du/dt of the whole batch in one JVP, whose primal carries the gradient; backward through the loss."""
    flow, network, objective = state.flow, state.flow.network, state.objective
    x1, t, r, dropped, n = draw(state, x0.shape, settings)
    z, v = flow.point(x0, x1, t)
    u_null = u_label = None
    if objective.guided:
        with torch.no_grad():
            u_null = network(z, t, t, torch.full_like(y, network.num_classes)).float()
            u_label = network(z, t, t, y).float() if objective.mixed else None
    v = guided(objective, v, t, dropped, u_null, u_label)
    label: Any = with_null(flow, y, dropped)
    u, derivative = values_and_derivative(network, At(z, t, r, label, v))
    derivative = derivative.detach().float()
    if observe is not None:
        observe("target", derivative=derivative)
    return _backward(state, u.float(), target(v, t, r, derivative), n, settings)


def losses_on_a_quarter(
    state: TrainState,
    x0: Tensor,
    y: Tensor,
    settings: Settings,
    observe: Observe | None = None,
    *,
    derivative: Derivative,
    taped: bool = False,
) -> dict[str, Tensor]:
    """du/dt without gradient where r != t, beside the student's forward of the whole batch. taped: of the former it
    takes the products of the latter."""
    flow, network, objective = state.flow, state.flow.network, state.objective
    x1, t, r, dropped, n = draw(state, x0.shape, settings)
    z, v = flow.point(x0, x1, t)
    label: Any = with_null(flow, y, dropped)
    u_null = u_label = None
    if objective.guided:
        null = torch.full_like(y, network.num_classes)
        x, times, labels = z, t, null
        if objective.mixed:
            x, times, labels = torch.cat([z, z[n:]]), torch.cat([t, t[n:]]), torch.cat([null, label[n:]])
        with torch.no_grad():
            u_null, u_label = network(x, times, times, labels).float().split([len(z), len(x) - len(z)])
    tape = TapedOutputs(slice(n, None)) if taped else None
    u = network(z, t, r, label, tape=tape).float()
    known = u.detach()
    if observe is not None:
        observe("student", output=known)
    if u_label is not None:
        u_label = torch.cat([known[:n], u_label]) if objective.mixed else None
    v = guided(objective, v, t, dropped, u_null, u_label)
    u_target = v
    if n < len(z):
        with torch.no_grad():
            at = At(z[n:], t[n:], r[n:], label[n:], v[n:])
            du = derivative(state, at, Student(known[n:], tape)).float()
        if observe is not None:
            observe("target", derivative=du)
        u_target = torch.cat([v[:n], target(v[n:], t[n:], r[n:], du)])
    del tape  # it would keep through the backward what the backward frees as it goes
    return _backward(state, u, u_target, n, settings)


def _backward(state: TrainState, u: Tensor, u_target: Tensor, n: int, settings: Settings) -> dict[str, Tensor]:
    """The loss of u against the target, backward through it, and what it came to."""
    error = (u - u_target).square().flatten(1)
    square = error.sum(1)
    loss = (square / (square.detach() + settings.eps) ** settings.p).mean()
    loss.backward()
    mse = error.detach().mean(1)
    return {"loss": loss.detach(), "fm_mse": mse[:n].mean(), "sc_mse": mse[n:].mean()}


def train_step(
    state: TrainState,
    x0: Tensor,
    y: Tensor,
    *,
    losses: Callable[..., dict[str, Tensor]],
    settings: Settings,
    observe: Observe | None = None,
) -> dict[str, Tensor]:
    """One whole update on a labelled batch x0 [B, C, H, W], y [B]. observe: is told the du/dt behind the target."""
    state.optimizer.zero_grad()  # no float32 gradient of a bf16 parameter is there while code is compiled
    with plain_operations(), matmul_precision(state.precision, state.device):
        metrics = losses(state, x0, y, settings, observe)
    metrics["grad_norm"] = fused.update(state)
    state.step += 1
    return metrics


def build(config: Config, weights: Weights | None = None, *, compiled: bool = False) -> TrainState:
    """A training state for a MeanFlow step. Raises ValueError for a path or coefficients that are not MeanFlow's."""
    if (config.flow.path, config.flow.coefficients) != ("linear", "euler"):
        raise ValueError(f"MeanFlow is of the linear path with Euler coefficients, not {config.flow}")
    state = fused.build(config, weights)
    if compiled:
        fused.compile_blocks(state.flow.network)
    return state


def network_calls(objective: Objective, separate: bool) -> int:
    """Guidance (two calls as published, else one), derivative, student (as published one with the derivative)."""
    if separate:
        return 1 + objective.guided + objective.mixed
    return 2 + objective.guided


def why_no_flash_jvp(config: Config) -> str | None:
    """Why jvp_flash_attention cannot be used, None: it can."""
    if importlib.util.find_spec("jvp_flash_attention") is None:
        return "jvp_flash_attention is not installed (pip install jvp_flash_attention)"
    if resolve_device(config.run.device).type != "cuda":
        return "jvp_flash_attention needs a GPU"
    tokens = (config.dit.input_size // config.dit.patch_size) ** 2
    if tokens % 2 or tokens < 32:
        return f"jvp_flash_attention needs an even number of at least 32 tokens, not {tokens}"
    return None
