"""The operations of soflow_kernels in a race: inputs at a shape, plain PyTorch beside each, bytes moved.

S of a docstring in soflow_kernels is `stream` here, in elements; its multiples are `forward` and `backward`, None where
the docstring has no formula, because products or launches are what counts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import soflow_kernels as k
from benchmarks.baselines.adaptive_norms import adaptive_norms
from benchmarks.baselines.adaptive_norms import gated_residual_norm as adaptive_gated_residual_norm
from benchmarks.baselines.norms import Found, gated_residual_norm, modulated, norms
from benchmarks.baselines.optimizers import Update, optimizers

Inputs = dict[str, Any]
OURS, EAGER, COMPILED = "soflow_kernels", "eager PyTorch", "torch.compile"
"""The names of the ways that every operation has."""
FREQUENCIES = 256
CLASSES = 1000


class Sizes(NamedTuple):
    """The sizes of an operation's inputs."""

    samples: int
    tokens: int
    width: int
    heads: int
    blocks: int
    """Blocks of the network whose parameters the optimiser updates."""


SHIPPED = Sizes(samples=256, tokens=256, width=1152, heads=16, blocks=4)
"""DiT-XL/2 at batch 256."""
SMALL = Sizes(samples=8, tokens=64, width=384, heads=6, blocks=1)
"""Sizes for a CPU."""


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operation. Functions take the inputs by name."""

    name: str
    ours: Callable[..., Any]
    reference: Callable[..., Any]
    """The same in plain PyTorch: any device, float64 too."""
    inputs: Callable[[Sizes, torch.device, torch.dtype], Inputs]
    trains: tuple[str, ...] = ()
    """Inputs whose gradients a training step takes; none: forward only."""
    writes: tuple[str, ...] = ()
    """Inputs that it writes to, if it works in place: they are its results."""
    kept: tuple[str, ...] = ()
    """Inputs whose dtype is the same in float64."""
    single: bool = False
    """Whether a training step in bfloat16 runs it in float32."""
    pair: bool = False
    """Whether its results are pairs of value and increment, which are judged apart."""
    roundings: int = 1
    """Times that an operand of a product inside is rounded."""
    stream: Callable[[Sizes], int]
    forward: float | None
    backward: float | None = None
    others: Mapping[str, "Callable[..., Any] | str"] = field(default_factory=dict)
    """Other people's ways, or why they are not here."""

    def traffic(self, sizes: Sizes, dtype: torch.dtype, backward: bool) -> int | None:
        """Bytes moved."""
        if self.forward is None or (backward and self.backward is None):
            return None
        passes = self.forward + (self.backward or 0 if backward else 0)
        return round(passes * self.stream(sizes) * dtype.itemsize)


def operations(device: torch.device) -> list[Operation]:
    """All operations. `device` decides which of the others can take part."""
    found, adaptive, optimisers = norms(device), adaptive_norms(device), optimizers(device)
    increments = partial(_increment_tokens, 1)
    return [
        Operation(
            name="layernorm_modulate",
            ours=k.layernorm_modulate,
            reference=k.layernorm_modulate_reference,
            inputs=_norm_inputs,
            trains=("x", "shift", "scale"),
            stream=_tokens,
            forward=2,
            backward=3,
            others={**_ways(found, modulated), **adaptive},
        ),
        Operation(
            name="gate_residual_layernorm_modulate",
            ours=k.gate_residual_layernorm_modulate,
            reference=k.gate_residual_layernorm_modulate_reference,
            inputs=_gated_residual_inputs,
            trains=("x", "y", "gate", "shift", "scale", "bias"),
            stream=_tokens,
            forward=4,
            backward=6,
            others=_ways(found, gated_residual_norm) | _ways(adaptive, adaptive_gated_residual_norm),
        ),
        Operation(
            name="gate_residual",
            ours=k.gate_residual,
            reference=k.gate_residual_reference,
            inputs=lambda *at: {key: _gated_residual_inputs(*at)[key] for key in ("x", "y", "gate", "bias")},
            trains=("x", "y", "gate", "bias"),
            stream=_tokens,
            forward=3,
            backward=3,
        ),
        Operation(
            name="rmsnorm_modulate",
            ours=k.rmsnorm_modulate,
            reference=k.rmsnorm_modulate_reference,
            inputs=_rmsnorm_inputs,
            trains=("x", "shift", "scale", "weight"),
            stream=_tokens,
            forward=2,
            backward=3,
        ),
        Operation(
            name="gate_residual_rmsnorm_modulate",
            ours=k.gate_residual_rmsnorm_modulate,
            reference=k.gate_residual_rmsnorm_modulate_reference,
            inputs=lambda *at: _gated_residual_inputs(*at, last="weight"),
            trains=("x", "y", "gate", "shift", "scale", "weight"),
            stream=_tokens,
            forward=4,
            backward=6,
        ),
        Operation(
            name="bias_gelu",
            ours=k.bias_gelu,
            reference=k.bias_gelu_reference,
            inputs=_gelu_inputs,
            trains=("x", "bias"),
            stream=lambda sizes: 4 * _tokens(sizes),
            forward=2,
            backward=3,
        ),
        Operation(
            name="qk_rms_norm",
            ours=k.qk_rms_norm,
            reference=k.qk_rms_norm_reference,
            inputs=_heads_inputs,
            trains=("q", "k", "q_weight", "k_weight"),
            stream=_tokens,
            forward=4,
            backward=6,
            others={"torch's rms_norm": _rms_norms if device.type == "cuda" else "of a CPU it is eager PyTorch's"},
        ),
        Operation(
            name="linear_gelu",
            ours=k.linear_gelu,
            reference=k.linear_gelu_reference,
            inputs=_linear_inputs,
            trains=("x", "weight", "bias"),
            roundings=2,  # our product is rounded before its bias is added
            stream=_tokens,
            forward=None,
        ),
        Operation(
            name="dual_time_embedding",
            ours=k.dual_time_embedding,
            reference=k.dual_time_embedding_reference,
            inputs=_embedding_inputs,
            trains=("t_weights", "s_weights", "table"),
            single=True,
            stream=_tokens,
            forward=None,
        ),
        Operation(
            name="path_point",
            ours=k.path_point,
            reference=k.path_point_reference,
            inputs=lambda *at: {key: _images(*at)[key] for key in ("x0", "x1", "t")},
            single=True,
            stream=_pixels,
            forward=4,
        ),
        Operation(
            name="euler_lookahead",
            ours=partial(k.euler_lookahead, guidance_scale=3.0, guidance_decay_time=0.8, mix_ratio=0.25),
            reference=partial(k.euler_lookahead_reference, guidance_scale=3.0, guidance_decay_time=0.8, mix_ratio=0.25),
            inputs=_lookahead_inputs,
            single=True,
            stream=_pixels,
            forward=7,
        ),
        Operation(
            name="consistency_loss",
            ours=k.consistency_loss,
            reference=k.consistency_loss_reference,
            inputs=_consistency_inputs,
            trains=("output",),
            single=True,
            stream=_pixels,
            forward=4,
            backward=2,
        ),
        Operation(
            name="flow_matching_loss",
            ours=partial(k.flow_matching_loss, guidance_scale=3.0, guidance_decay_time=0.8, mix_ratio=0.25),
            reference=partial(
                k.flow_matching_loss_reference, guidance_scale=3.0, guidance_decay_time=0.8, mix_ratio=0.25
            ),
            inputs=_flow_matching_inputs,
            trains=("output",),
            single=True,
            stream=_pixels,
            forward=4,
            backward=2,
        ),
        Operation(
            name="layernorm_modulate_increment",
            ours=k.layernorm_modulate_increment,
            reference=k.layernorm_modulate_increment_reference,
            inputs=lambda *at: {key: _increment_inputs(*at)[key] for key in ("x", "shift", "scale")},
            stream=increments,
            forward=3,
        ),
        Operation(
            name="gate_residual_layernorm_modulate_increment",
            ours=k.gate_residual_layernorm_modulate_increment,
            reference=k.gate_residual_layernorm_modulate_increment_reference,
            inputs=_gate_increment_inputs,
            stream=increments,
            forward=6,
        ),
        Operation(
            name="bias_gelu_increment",
            ours=k.bias_gelu_increment,
            reference=k.bias_gelu_increment_reference,
            inputs=_gelu_increment_inputs,
            stream=partial(_increment_tokens, 4),
            forward=3,
        ),
        Operation(
            name="silu_increment",
            ours=k.silu_increment,
            reference=k.silu_increment_reference,
            inputs=lambda *at: {"x": _increment_inputs(*at)["x"]},
            stream=increments,
            forward=3,
        ),
        Operation(
            name="time_embedding_increment",
            ours=k.time_embedding_increment,
            reference=lambda t, dt, s: k.time_embedding_increment_reference(t, dt, s, dtype=t.dtype),
            inputs=_time_increment_inputs,
            single=True,
            pair=True,
            stream=_tokens,
            forward=None,
        ),
        Operation(
            name="attention_increment",
            ours=k.attention_increment,
            reference=k.attention_increment_reference,
            inputs=_attention_inputs,
            roundings=2,  # P and dP
            stream=increments,
            forward=7,
        ),
        Operation(
            name="qk_rms_norm_increment",
            ours=k.qk_rms_norm_increment,
            reference=k.qk_rms_norm_increment_reference,
            inputs=_heads_increment_inputs,
            stream=increments,
            forward=6,
        ),
        *(_adamw(low, optimisers) for low in (False, True)),
    ]


def _ways(found: Found, operation: Callable[..., Any]) -> dict[str, Callable[..., Any] | str]:
    """An operation by what other people offer for a part of it."""
    return {name: way if isinstance(way, str) else partial(operation, way) for name, way in found.items()}


def _tokens(sizes: Sizes) -> int:
    return sizes.samples * sizes.tokens * sizes.width


def _pair_samples(sizes: Sizes) -> int:
    """Samples of the consistency part, a quarter of the batch in the public recipe."""
    return max(1, sizes.samples // 4)


def _increment_tokens(times: int, sizes: Sizes) -> int:
    return times * _pair_samples(sizes) * sizes.tokens * sizes.width


def _pixels(sizes: Sizes) -> int:
    """Latents of 4 channels in patches of 2 x 2."""
    return sizes.samples * 16 * sizes.tokens


def _noise(*shape: int, device: torch.device, dtype: torch.dtype, size: float = 1.0) -> Tensor:
    return (size * torch.randn(shape, device=device)).to(dtype)


def _norm_inputs(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Inputs:
    B, T, D = sizes.samples, sizes.tokens, sizes.width
    # As the model hands them over: chunks of one tensor.
    shift, scale = _noise(B, 2 * D, device=device, dtype=dtype, size=0.5).chunk(2, dim=1)
    return {"x": _noise(B, T, D, device=device, dtype=dtype), "shift": shift, "scale": scale}


def _rmsnorm_inputs(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Inputs:
    return {**_norm_inputs(sizes, device, dtype), "weight": _noise(sizes.width, device=device, dtype=dtype)}


def _gated_residual_inputs(sizes: Sizes, device: torch.device, dtype: torch.dtype, last: str = "bias") -> Inputs:
    """last: the name of a row [D], the bias of y or the weight of a norm."""
    B, T, D = sizes.samples, sizes.tokens, sizes.width
    gate, shift, scale = _noise(B, 3 * D, device=device, dtype=dtype, size=0.5).chunk(3, dim=1)
    x, y = (_noise(B, T, D, device=device, dtype=dtype) for _ in range(2))
    row = _noise(D, device=device, dtype=dtype)
    return {"x": x, "y": y, "gate": gate, "shift": shift, "scale": scale, last: row}


def _gelu_inputs(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Inputs:
    D = 4 * sizes.width
    x = _noise(sizes.samples, sizes.tokens, D, device=device, dtype=dtype)
    return {"x": x, "bias": _noise(D, device=device, dtype=dtype)}


def _heads_inputs(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Inputs:
    d = sizes.width // sizes.heads
    # As the model hands them over: parts of one product.
    qkv = _noise(sizes.samples, sizes.tokens, 3, sizes.heads, d, device=device, dtype=dtype)
    weights = {name: 1 + _noise(d, device=device, dtype=dtype, size=0.5) for name in ("q_weight", "k_weight")}
    return {"q": qkv[:, :, 0], "k": qkv[:, :, 1], **weights}


def _rms_norms(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor]:
    shape = tuple(q_weight.shape)
    return F.rms_norm(q, shape, q_weight, 1e-6), F.rms_norm(k, shape, k_weight, 1e-6)


def _linear_inputs(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Inputs:
    D = sizes.width
    x = _noise(sizes.samples, sizes.tokens, D, device=device, dtype=dtype)
    weight = _noise(4 * D, D, device=device, dtype=dtype, size=D**-0.5)
    return {"x": x, "weight": weight, "bias": _noise(4 * D, device=device, dtype=dtype)}


def _embedding_inputs(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Inputs:
    B, D = sizes.samples, sizes.width
    noise = partial(_noise, device=device, dtype=dtype)
    t = torch.rand(B, device=device)

    def weights() -> tuple[Tensor, ...]:
        return noise(D, FREQUENCIES, size=FREQUENCIES**-0.5), noise(D), noise(D, D, size=D**-0.5), noise(D)

    return {
        "t": t,
        "s": t * torch.rand(B, device=device),
        "y": torch.randint(CLASSES, (B,), device=device),
        "t_weights": weights(),
        "s_weights": weights(),
        "table": noise(CLASSES + 1, D),
    }


def _images(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Inputs:
    """All inputs of the path and of the losses, [B, 4, H, W] and [B]."""
    B = sizes.samples
    names = ("x0", "x1", "x_t", "v_t", "v_null", "v_label", "output", "x", "target", "increment")
    shape = (B, 4, 2, 2 * sizes.tokens)
    images = {name: _noise(*shape, device=device, dtype=dtype) for name in names}
    t = 0.1 + 0.9 * torch.rand(B, device=device)
    s = 0.5 * t
    images["increment"] *= 0.01
    return {**images, "t": t, "s": s, "l": t + 0.01 * (s - t), "label_dropped": torch.arange(B, device=device) % 8 == 0}


def _lookahead_inputs(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Inputs:
    images = _images(sizes, device, dtype)
    return {key: images[key] for key in ("x_t", "v_t", "t", "l", "v_null", "v_label", "label_dropped")}


def _consistency_inputs(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Inputs:
    images = _images(sizes, device, dtype)
    return {key: images[key] for key in ("output", "increment", "x", "target", "t", "l", "s")}


def _flow_matching_inputs(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Inputs:
    images = _images(sizes, device, dtype)
    return {key: images[key] for key in ("output", "v_t", "t", "v_null", "label_dropped")}


def _pair(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A value and an increment a hundredth as large."""
    return torch.stack([_noise(*shape, device=device, dtype=dtype, size=size) for size in (1.0, 0.01)])


def _increment_inputs(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Inputs:
    B, T, D = _pair_samples(sizes), sizes.tokens, sizes.width
    pair = partial(_pair, device=device, dtype=dtype)
    gate, shift, scale = pair(B, 3 * D).chunk(3, dim=2)
    inputs = {"x": pair(B, T, D), "y": pair(B, T, D), "gate": gate, "shift": shift, "scale": scale}
    return {**inputs, "bias": _noise(D, device=device, dtype=dtype)}


def _gate_increment_inputs(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Inputs:
    inputs = _increment_inputs(sizes, device, dtype)
    total, dx = inputs.pop("x")
    return {"total": total, "dx": dx, **inputs}


def _gelu_increment_inputs(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Inputs:
    D = 4 * sizes.width
    x = _pair(_pair_samples(sizes), sizes.tokens, D, device=device, dtype=dtype)
    return {"x": x, "bias": _noise(D, device=device, dtype=dtype)}


def _time_increment_inputs(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Inputs:
    t = 0.1 + 0.9 * torch.rand(_pair_samples(sizes), device=device)
    return {"t": t, "dt": -0.002 * t, "s": 0.5 * t}


def _attention_inputs(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Inputs:
    shape = _pair_samples(sizes), sizes.tokens, 3, sizes.heads, sizes.width // sizes.heads
    q, key, v = (part.transpose(2, 3) for part in _pair(*shape, device=device, dtype=dtype).unbind(3))
    return {"q": q, "k": key, "v": v}


def _heads_increment_inputs(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Inputs:
    pairs, weights = _attention_inputs(sizes, device, dtype), _heads_inputs(sizes, device, dtype)
    return {key: pairs[key] for key in ("q", "k")} | {key: weights[key] for key in ("q_weight", "k_weight")}


def _adamw(low: bool, optimisers: Found[Update]) -> Operation:
    """The optimiser with float32 gradients and an average, 36 bytes a parameter, or (low) with
    bfloat16 gradients and weights, 38. Its reference: torch's fused AdamW, then the average by `foreach` operations."""
    settings: dict[str, Any] = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
    return Operation(
        name="adamw_ema, bfloat16 gradients and copies" if low else "adamw_ema",
        ours=partial(k.adamw_ema, **settings),
        reference=partial(k.adamw_ema_reference, **settings),
        inputs=partial(_adamw_inputs, low),
        writes=("params", "exp_avgs", "exp_avg_sqs", "emas", *(["low_precision"] if low else [])),
        kept=("steps", "lr", "low_precision"),  # rounded parameters: of another dtype they would be others
        single=True,
        stream=lambda sizes: sizes.blocks * 18 * sizes.width**2,
        forward=9.5 if low else 9,
        others=_ways(optimisers, lambda way, **inputs: way(**inputs, **settings)),
    )


def _adamw_inputs(low: bool, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Inputs:
    D = sizes.width
    shapes = [(3 * D, D), (D, D), (4 * D, D), (D, 4 * D), (6 * D, D)] * sizes.blocks
    noise = partial(_noise, device=device)
    params, grads, firsts, averages = ([noise(*shape, dtype=dtype) for shape in shapes] for _ in range(4))
    inputs: Inputs = {
        "params": params,
        "grads": [g.bfloat16() for g in grads] if low else grads,
        "exp_avgs": firsts,
        "exp_avg_sqs": [noise(*shape, dtype=dtype).square() for shape in shapes],
        "steps": [torch.full((), 3.0, device=device) for _ in shapes],
        "lr": torch.full((), 1e-2, device=device),
        "emas": [averages],
        "ema_decays": torch.tensor([0.5], dtype=torch.float64, device=device),
    }
    return inputs | ({"low_precision": [p.bfloat16() for p in params]} if low else {})
