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

Four ways to du/dt. "as published" takes u and du/dt of the whole batch from one torch.func.jvp, whose primal is what is
differentiated, after two calls for guidance. The others are what the method comes to when nothing is wasted: du/dt only
where r != t, without gradient; the student's forward apart, with fused attention, on the whole batch; one call for
guidance, which takes u(z, t, t | c) only where r != t and finds it in the student's forward elsewhere. torch's fused
attention has no forward-mode derivative, so under a JVP attention is composed of products and a softmax.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from benchmarks.baselines import fused
from benchmarks.recipes import plain_operations
from soflow_fast.config import Config
from soflow_fast.flow import per_sample
from soflow_fast.low_precision import operands
from soflow_fast.model import Block, DiT
from soflow_fast.objective import Objective, with_null
from soflow_fast.products import Entry, Weight, normed_linear
from soflow_fast.quotient import products
from soflow_fast.rng import generator
from soflow_fast.state import TrainState, resolve_device
from soflow_fast.step import split

STEP = 1e-3
"""h of the finite difference, in float32: where truncation, h/2 |d2u/dt2|, meets rounding, some 2^-22 |u| / h."""
FLASH_HEADS = (16, 32, 64, 128, 256)
"""The head dimensions of jvp_flash_attention; others are filled up with zeros."""


@dataclass(frozen=True)
class Settings:
    """What is MeanFlow's own; the defaults are published."""

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


Derivative = Callable[[TrainState, At, Tensor], Tensor]
"""(state, at, u(z, r, t) of the student, detached) -> du/dt [B, C, H, W], without gradient."""


def draw(state: TrainState, shape: torch.Size, settings: Settings) -> Draws:
    """Noise, times and dropped labels of the next step."""
    config, objective, B = state.config, state.objective, shape[0]

    def source(purpose: str) -> torch.Generator:
        return generator(config.seed, state.step, 0, purpose, state.device)

    x1 = torch.randn(shape, generator=source("noise"), device=state.device)
    times = source("time")
    if settings.time is None:
        n = split(B, config.objective.fm_fraction, 0, B)
        t_equal = objective.flow_matching_times(n, times)
        t, r = objective.consistency_times(B - n, times)
        t, r = torch.cat([t_equal, t]), torch.cat([t_equal, r])
    else:
        n = split(B, settings.equal, 0, B)
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
    target = omega * v + (1 - omega - kappa) * u_null + (0 if u_label is None else kappa * u_label)
    return torch.where(per_sample(~dropped & (t <= c.guidance_decay_time), v) != 0, target, v)


def composed_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of q, k, v [B, heads, T, d] as products and a softmax, which have forward-mode derivatives."""
    return ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1) @ v


def flash_attention_of_duals(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """jvp_flash_attention. Its `attention` drops tangents; `fwd_dual` carries them."""
    from jvp_flash_attention.jvp_attention import JVPAttn  # pyright: ignore[reportMissingImports]

    d = q.shape[-1]
    missing = next(size for size in FLASH_HEADS if size >= d) - d
    if missing:
        q, k, v = (torch.nn.functional.pad(value, (0, missing)) for value in (q, k, v))
    return JVPAttn.fwd_dual(q, k, v, sm_scale=d**-0.5)[..., :d]


@contextmanager
def attending(network: DiT, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Within the context the blocks of the network take another attention of q, k, v [B, heads, T, d].

    It is one for transforms: under them copies of weights cannot be written, so they are brought up to date before, and
    weights cannot say that they lie in a stack, so the modulations are products of their own.
    """
    network.refresh_copies()
    stack, network.stack = network.stack, None
    attentions = [block.attn for block in network.blocks]
    for attention in attentions:
        attention.forward = _forward(function, attention.num_heads)
    try:
        yield
    finally:
        network.stack = stack
        for attention in attentions:
            del attention.forward


@functools.cache
def _forward(function: Callable[[Tensor, Tensor, Tensor], Tensor], heads: int) -> Callable[[Tensor], Tensor]:
    """`Attention.forward` with another attention; the same object every time, or compiled code would not know it."""

    def forward(qkv: Tensor) -> Tensor:
        B, T, D = qkv.shape
        q, k, v = qkv.reshape(B, T, 3, heads, -1).permute(2, 0, 3, 1, 4)
        return function(q, k, v).transpose(1, 2).reshape(B, T, D // 3)

    return forward


def jvp(network: DiT, at: At) -> tuple[Tensor, Tensor]:
    """u(z, r, t) and du/dt along (v, 0, 1), both with gradient where that is on."""
    with attending(network, composed_attention):
        tangents = (at.v, torch.ones_like(at.t))
        return torch.func.jvp(lambda z, t: network(z, t, at.r, at.y), (at.z, at.t), tangents)[:2]


def by_jvp(state: TrainState, at: At, given: Tensor) -> Tensor:
    """torch.func.jvp."""
    return jvp(state.flow.network, at)[1]


def by_compiled_jvp(state: TrainState, at: At, given: Tensor) -> Tensor:
    """torch.func.jvp block by block, each compiled with its derivative: torch.compile takes neither a compiled block
    under torch.func.jvp nor the copies of weights inside of it."""
    return jvp_by_blocks(state.flow.network, at, _compiled_block_jvp())


def jvp_by_blocks(network: DiT, at: At, block_jvp: Callable[..., Any]) -> Tensor:
    """du/dt along (v, 0, 1), the tangents handed from block to block as the DiT's forward hands on its values."""
    device = at.z.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else network.pos_embed.dtype

    def start(z: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        c = network.conditioning(t, at.r, at.y)
        return (network.x_embedder(z) + network.pos_embed).to(dtype), *network.modulations(c, dtype)

    def end(*values: Tensor) -> Tensor:
        x, branch, gate, shift, scale = values
        final = operands(network.final_layer.linear, network.pos_embed.dtype)
        return network.unpatchify(normed_linear(Entry(x, branch, gate, None, shift, scale), final)[1])

    with torch.autocast(device, enabled=False), attending(network, composed_attention):
        values, tangents = torch.func.jvp(start, (at.z, at.t), (at.v, torch.ones_like(at.t)))[:2]
        x, m = [values[:1], tangents[:1]], (values[1:], tangents[1:])
        for k, block in enumerate(network.blocks):
            first, last = 6 * k - (k > 0), 6 * k + 5  # the gate of the branch that is still open comes with it
            given = [(*of_x, *of_m[first:last]) for of_x, of_m in zip(x, m, strict=True)]
            weights = [operands(layer, dtype) for layer in block.products()]
            x = list(block_jvp(block, weights, *given))
        return torch.func.jvp(end, *((*of_x, *of_m[-3:]) for of_x, of_m in zip(x, m, strict=True)))[1]


def block_jvp(block: Block, weights: list[Weight], values: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Any:
    """The values (x, branch) that leave a block and their tangents, of those of (x, branch, gate of it, shift, scale,
    gate, shift, scale) that enter it; the first block has no branch and no gate of it."""

    def forward(*given: Tensor) -> tuple[Tensor, Tensor]:
        x, *branch = given[:-5]
        y, gate = branch or (None, None)
        shift, scale, *inner = given[-5:]
        out = block.forward(Entry(x, y, gate, None, shift, scale), tuple(inner), weights)  # pyright: ignore[reportArgumentType]
        return out[:2]

    return torch.func.jvp(forward, values, tangents)


@functools.cache
def _compiled_block_jvp() -> Callable[..., Any]:
    return torch.compile(block_jvp, fullgraph=True, dynamic=False)


def by_flash_jvp(state: TrainState, at: At, given: Tensor) -> Tensor:
    """Forward-mode AD with jvp_flash_attention, which reads the tangents off dual tensors."""
    network = state.flow.network
    # Compiled blocks refuse dual tensors.
    eager = torch.compiler.set_stance("force_eager")
    with eager, attending(network, flash_attention_of_duals), forward_ad.dual_level():
        z, t = forward_ad.make_dual(at.z, at.v), forward_ad.make_dual(at.t, torch.ones_like(at.t))
        tangent = forward_ad.unpack_dual(network(z, t, at.r, at.y)).tangent
        assert tangent is not None, "forward-mode AD lost the tangent"
        return tangent


def by_difference(state: TrainState, at: At, given: Tensor) -> Tensor:
    """A finite difference in float32, as lower precision would drown it: against the student's value where that is
    float32, else central, both ends in one call."""
    network, dz = state.flow.network, STEP * at.v
    with products("fp32", at.z.device):
        if state.precision == "fp32":
            return (given - network(at.z - dz, at.t - STEP, at.r, at.y)) / STEP
        ends = (torch.cat([at.z + dz, at.z - dz]), torch.cat([at.t + STEP, at.t - STEP]), at.r.repeat(2))
        upper, lower = network(*ends, at.y.repeat(2)).chunk(2)
        return (upper - lower) / (2 * STEP)


def losses_as_published(state: TrainState, x0: Tensor, y: Tensor, settings: Settings) -> dict[str, Tensor]:
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
    u, derivative = jvp(network, At(z, t, r, label, v))
    return _backward(state, u.float(), v - per_sample(t - r, v) * derivative.detach().float(), n, settings)


def losses_on_a_quarter(
    state: TrainState, x0: Tensor, y: Tensor, settings: Settings, derivative: Derivative
) -> dict[str, Tensor]:
    """du/dt without gradient where r != t, beside the student's forward of the whole batch."""
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
    u = network(z, t, r, label).float()
    known = u.detach()
    if u_label is not None:
        u_label = torch.cat([known[:n], u_label]) if objective.mixed else None
    v = guided(objective, v, t, dropped, u_null, u_label)
    target = v
    if n < len(z):
        with torch.no_grad():
            du = derivative(state, At(z[n:], t[n:], r[n:], label[n:], v[n:]), known[n:]).float()
        target = torch.cat([v[:n], v[n:] - per_sample(t[n:] - r[n:], v) * du])
    return _backward(state, u, target, n, settings)


def _backward(state: TrainState, u: Tensor, target: Tensor, n: int, settings: Settings) -> dict[str, Tensor]:
    """The loss of u against the target, backward through it, and what it came to."""
    error = (u - target).square().flatten(1)
    square = error.sum(1)
    loss = (square / (square.detach() + settings.eps) ** settings.p).mean()
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    mse = error.detach().mean(1)
    return {"loss": loss.detach(), "fm_mse": mse[:n].mean(), "sc_mse": mse[n:].mean()}


def train_step(
    state: TrainState, x0: Tensor, y: Tensor, losses: Callable[..., dict[str, Tensor]], settings: Settings
) -> dict[str, Tensor]:
    """One whole update on a labelled batch x0 [B, C, H, W], y [B]."""
    with plain_operations(), products(state.precision, state.device):
        metrics = losses(state, x0, y, settings)
    metrics["grad_norm"] = fused.update(state)
    state.step += 1
    return metrics


def build(config: Config, compiled: bool = False) -> TrainState:
    """A training state for a MeanFlow step. Raises ValueError for a path or coefficients that are not MeanFlow's."""
    if (config.flow.path, config.flow.coefficients) != ("linear", "euler"):
        raise ValueError(f"MeanFlow is of the linear path with Euler coefficients, not {config.flow}")
    state = fused.build(config)
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
    tokens = (config.model.input_size // config.model.patch_size) ** 2
    if tokens % 2 or tokens < 32:
        return f"jvp_flash_attention needs an even number of at least 32 tokens, not {tokens}"
    return None
