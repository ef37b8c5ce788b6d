"""The path's point and velocity, the guided and mixed target, and the Euler look-ahead of SoFlow (arXiv 2512.15657).

    x_t = alpha(t) x_0 + beta(t) x_1,   v_t = alpha'(t) x_0 + beta'(t) x_1
    v_g = v_t + c(t) (w - 1) (v_t - v_null),   target = m v_g + (1 - m) v_label   (v_t where the label was dropped)
    dx = (l - t) target,   x_l = x_t + dx

Paths: "linear" 1 - t, t; "trig" cos(pi/2 t), sin(pi/2 t). w: guidance scale, one for all samples or one for each; m:
mix ratio; c(t) = 1 up to t_d and 1 - exp(-0.025 d / (1 - d)), d = (1 - t) / (1 - t_d), after it. Images [B, ...]
bfloat16, float16 or float32, float32 inside; t, l: [B]. The network's guidance passes lie between the two operations,
so they are one launch each.

Bytes, with S = one pass over [B, ...]: point 4 S; look-ahead 7 S (5 S without guidance). At 256 x 4 x 32 x 32 in
float32 S is 4.2 MB: 4 and 7 microseconds at 4.3 TB/s; what counts is the number of launches.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from soflow_kernels._dispatch import check_tensor, jit, launch, operation, tl, use_kernel
from soflow_kernels._math import expm1, sincos_of_quarters
from soflow_kernels._rows import power_of_two

PATHS = ("linear", "trig")
BLOCK = 1024
HALF_PI = math.pi / 2


class Lookahead(NamedTuple):
    """The results of `euler_lookahead`, all like x_t."""

    target: Tensor
    """The velocity target."""
    dx: Tensor
    """x_l - x_t, before it was rounded into x_l."""
    x_l: Tensor
    """The point at time l."""


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ...], so that it multiplies `like`, in its dtype."""
    return value.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))


def guidance_decay(t: Tensor, guidance_decay_time: float) -> Tensor:
    """c(t), like t: 1 up to the decay time, then falling to almost 0 at t = 1."""
    if guidance_decay_time >= 1:
        return torch.ones_like(t)
    d = ((1 - t) / (1 - guidance_decay_time)).clamp(0, 1 - 1e-6)
    return torch.where(t <= guidance_decay_time, torch.ones_like(t), -torch.expm1(-0.025 * d / (1 - d)))


def guided_target(
    v_t: Tensor, v_null: Tensor | None, v_label: Tensor | None, t: Tensor, label_dropped: Tensor | None,
    guidance_scale: float | Tensor, guidance_decay_time: float, mix_ratio: float,
) -> Tensor:  # fmt: skip
    """The velocity target of the module's docstring in plain PyTorch; v_null None: v_t, v_label None: m = 1."""
    if v_null is None:
        return v_t
    strength = per_sample(guidance_decay(t, guidance_decay_time) * (guidance_scale - 1), v_t)
    target = v_t + strength * (v_t - v_null.detach())
    if v_label is not None:
        target = mix_ratio * target + (1 - mix_ratio) * v_label.detach()
    if label_dropped is None:
        return target
    return torch.where(label_dropped.reshape(-1, *[1] * (v_t.dim() - 1)), v_t, target)


def path_point_reference(x0: Tensor, x1: Tensor, t: Tensor, *, path: str = "linear") -> tuple[Tensor, Tensor]:
    """`path_point` in plain PyTorch: any device and dtype, differentiable."""
    if path == "linear":
        coefficients = 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    else:
        cos, sin = torch.cos(HALF_PI * t), torch.sin(HALF_PI * t)
        coefficients = cos, sin, -HALF_PI * sin, HALF_PI * cos
    alpha, beta, dalpha, dbeta = (per_sample(c, x0) for c in coefficients)
    return (alpha * x0 + beta * x1).to(x0.dtype), (dalpha * x0 + dbeta * x1).to(x0.dtype)


def euler_lookahead_reference(
    x_t: Tensor, v_t: Tensor, t: Tensor, l: Tensor,
    v_null: Tensor | None = None, v_label: Tensor | None = None, label_dropped: Tensor | None = None, *,
    guidance_scale: float | Tensor = 1.0, guidance_decay_time: float = 1.0, mix_ratio: float = 1.0,
) -> Lookahead:  # fmt: skip
    """`euler_lookahead` in plain PyTorch: any device and dtype, differentiable in x_t and v_t."""
    target = guided_target(v_t, v_null, v_label, t, label_dropped, guidance_scale, guidance_decay_time, mix_ratio)
    dx = target * per_sample(l - t, x_t)
    return Lookahead(target.to(x_t.dtype), dx.to(x_t.dtype), (x_t + dx).to(x_t.dtype))


@jit
def decay(t, t_d):
    """c(t)."""
    d = tl.minimum(tl.maximum((1 - t) / (1 - t_d), 0.0), 0.999999)
    z = 0.025 * d / (1 - d)
    far = tl.where(z < 0.5, -expm1(-tl.minimum(z, 0.5)), 1 - tl.exp(-z))
    return tl.where(t <= t_d, 1.0, far)


@jit
def guided(v_t, v_null, v_label, strength, mix_ratio, dropped):
    """The target; `strength` is c(t) (w - 1)."""
    target = mix_ratio * (v_t + strength * (v_t - v_null)) + (1 - mix_ratio) * v_label
    return tl.where(dropped != 0, v_t, target)


# Both kernels: a program does BLOCK elements `cols` of the n of sample b, which has `blocks` of them; at: their places.


@jit
def _point_kernel(
    x0_ptr, x1_ptr, t_ptr, x_ptr, v_ptr, n, blocks, TRIG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    b = program // blocks
    cols = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < n
    at = b * n + cols
    t = tl.load(t_ptr + b).to(tl.float32)
    x0 = tl.load(x0_ptr + at, mask=mask, other=0.0).to(tl.float32)
    x1 = tl.load(x1_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if TRIG:
        sin, cos = sincos_of_quarters(t)
        x = cos * x0 + sin * x1
        v = 1.5707963267948966 * (cos * x1 - sin * x0)
    else:
        x = (1 - t) * x0 + t * x1
        v = x1 - x0
    tl.store(x_ptr + at, x, mask=mask)
    tl.store(v_ptr + at, v, mask=mask)


@jit
def _lookahead_kernel(
    x_ptr, v_ptr, null_ptr, label_ptr, dropped_ptr, scales_ptr, t_ptr, l_ptr, target_ptr, dx_ptr, xl_ptr,
    n, blocks, scale, t_d, mix_ratio,
    GUIDED: tl.constexpr, MIXED: tl.constexpr, DROPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    b = program // blocks
    cols = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < n
    at = b * n + cols
    t = tl.load(t_ptr + b).to(tl.float32)
    l = tl.load(l_ptr + b).to(tl.float32)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    target = tl.load(v_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if GUIDED:
        v_null = tl.load(null_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if MIXED:
            v_label = tl.load(label_ptr + at, mask=mask, other=0.0).to(tl.float32)
            mix = mix_ratio
        else:
            v_label = target
            mix = 1.0
        dropped = 0
        if DROPS:
            dropped = tl.load(dropped_ptr + b).to(tl.int32)
        if scales_ptr is not None:
            scale = tl.load(scales_ptr + b).to(tl.float32)
        target = guided(target, v_null, v_label, decay(t, t_d) * (scale - 1), mix, dropped)
    dx = target * (l - t)
    tl.store(target_ptr + at, target, mask=mask)
    tl.store(dx_ptr + at, dx, mask=mask)
    tl.store(xl_ptr + at, x + dx, mask=mask)


def _layout(n):
    """(block, blocks a sample, warps): four elements a thread, a 16-byte load of float32."""
    block = min(BLOCK, power_of_two(max(n, 1)))
    return block, -(-n // block), max(block // 256, 1)


@operation("soflow::path_point")
def _path_point(x0: Tensor, x1: Tensor, t: Tensor, trig: bool) -> tuple[Tensor, Tensor]:
    x0 = x0.contiguous()
    x, v = (torch.empty(x0.shape, dtype=x0.dtype, device=x0.device) for _ in range(2))
    n = math.prod(x0.shape[1:])
    block, blocks, warps = _layout(n)
    launch(
        _point_kernel, (x0.shape[0] * blocks,),
        x0, x1.contiguous(), t.contiguous(), x, v, n, blocks, TRIG=trig, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return x, v


@_path_point.register_fake
def _(x0, x1, t, trig):
    return x0.new_empty(x0.shape), x0.new_empty(x0.shape)


@operation("soflow::euler_lookahead")
def _euler_lookahead(
    x_t: Tensor, v_t: Tensor, t: Tensor, l: Tensor, v_null: Tensor | None, v_label: Tensor | None,
    label_dropped: Tensor | None, guidance_scale: float, guidance_decay_time: float, mix_ratio: float,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x_t, v_t = x_t.contiguous(), v_t.contiguous()
    outs = [torch.empty(x_t.shape, dtype=x_t.dtype, device=x_t.device) for _ in range(3)]
    n = math.prod(x_t.shape[1:])
    block, blocks, warps = _layout(n)
    launch(
        _lookahead_kernel, (x_t.shape[0] * blocks,),
        x_t, v_t, v_t if v_null is None else v_null.contiguous(), v_t if v_label is None else v_label.contiguous(),
        t if label_dropped is None else label_dropped.contiguous().view(torch.uint8),
        None if scales is None else scales.contiguous(), t.contiguous(), l.contiguous(),
        *outs, n, blocks, float(guidance_scale), float(guidance_decay_time), float(mix_ratio),
        GUIDED=v_null is not None, MIXED=v_label is not None, DROPS=label_dropped is not None, BLOCK=block,
        num_warps=warps,
    )  # fmt: skip
    return outs[0], outs[1], outs[2]


@_euler_lookahead.register_fake
def _(x_t, v_t, t, l, v_null, v_label, label_dropped, guidance_scale, guidance_decay_time, mix_ratio, scales=None):
    return x_t.new_empty(x_t.shape), x_t.new_empty(x_t.shape), x_t.new_empty(x_t.shape)


def _plain(*tensors):
    """Whether no tensor asks for a gradient: these operations have no backward, their references do."""
    return not torch.is_grad_enabled() or not any(v is not None and v.requires_grad for v in tensors)


def check_mask(op: str, name: str, value: object, shape: tuple[int, ...], like: Tensor) -> None:
    """Raise ValueError unless `value` is None or a bool tensor of `shape` on the device of `like`."""
    if value is None:
        return
    if not isinstance(value, Tensor) or value.dtype != torch.bool or tuple(value.shape) != shape:
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{op}: {name} must be a bool tensor of shape {list(shape)} or None, got {got}")
    if value.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device}, got {value.device}")


def split_scale(op: str, guidance_scale: float | Tensor, like: Tensor) -> tuple[float, Tensor | None]:
    """A guidance scale as (number, None), or (1, scales [B]) where each sample has its own. Raises ValueError."""
    if not isinstance(guidance_scale, Tensor):
        return float(guidance_scale), None
    check_tensor(op, "guidance_scale", guidance_scale, (like.shape[0],), like)
    return 1.0, guidance_scale.detach()


def path_point(x0: Tensor, x1: Tensor, t: Tensor, *, path: str = "linear") -> tuple[Tensor, Tensor]:
    """The point x_t and the velocity v_t on the path from data x0 to noise x1, in one launch.

    x0, x1: [B, ...], bfloat16, float16, float32 or float64 (which takes the reference); t: [B] in [0, 1]; path:
    "linear" or "trig". Returns (x_t, v_t), both like x0.
    Differentiable, by the reference. Raises ValueError naming the argument that is wrong.
    """
    op = "path_point"
    check_tensor(op, "x0", x0, (..., "elements"))
    check_tensor(op, "x1", x1, tuple(x0.shape), x0)
    check_tensor(op, "t", t, (x0.shape[0],), x0)
    if path not in PATHS:
        raise ValueError(f"{op}: path must be one of {', '.join(PATHS)}, got {path!r}")
    if not (use_kernel(x0, x1, t) and _plain(x0, x1, t)):
        return path_point_reference(x0, x1, t, path=path)
    return _path_point(x0, x1, t, path == "trig")


def euler_lookahead(
    x_t: Tensor, v_t: Tensor, t: Tensor, l: Tensor,
    v_null: Tensor | None = None, v_label: Tensor | None = None, label_dropped: Tensor | None = None, *,
    guidance_scale: float | Tensor = 1.0, guidance_decay_time: float = 1.0, mix_ratio: float = 1.0,
) -> Lookahead:  # fmt: skip
    """The velocity target under guidance and mixing, and the Euler step along it from t to l: (target, dx, x_l).

    x_t, v_t: [B, ...], the point and velocity of the path, bfloat16, float16, float32 or float64; t, l: [B]. v_null,
    v_label: like x_t, the network's velocity without and with the label, taken without gradient; v_null None: no
    guidance, the target is v_t; v_label None: the mix ratio is 1. label_dropped: bool [B], where the target stays v_t;
    None: nowhere. guidance_scale: w, a number or [B], one for each sample. Returns tensors like x_t.
    Differentiable in x_t and v_t, by the reference. Raises ValueError naming the argument that is wrong.
    """
    op = "euler_lookahead"
    check_tensor(op, "x_t", x_t, (..., "elements"))
    for name, value in (("v_t", v_t), ("v_null", v_null), ("v_label", v_label)):
        if name == "v_t" or value is not None:
            check_tensor(op, name, value, tuple(x_t.shape), x_t)
    for name, value in (("t", t), ("l", l)):
        check_tensor(op, name, value, (x_t.shape[0],), x_t)
    check_mask(op, "label_dropped", label_dropped, (x_t.shape[0],), x_t)
    if v_null is None and v_label is not None:
        raise ValueError(f"{op}: v_label must come with v_null")
    scale, scales = split_scale(op, guidance_scale, x_t)
    settings = {"guidance_decay_time": guidance_decay_time, "mix_ratio": mix_ratio}
    if not (use_kernel(x_t, v_t, t, l, v_null, v_label, scales) and _plain(x_t, v_t, t, l)):
        settings = {**settings, "guidance_scale": scale if scales is None else scales}
        return euler_lookahead_reference(x_t, v_t, t, l, v_null, v_label, label_dropped, **settings)
    others = (None if v is None else v.detach() for v in (v_null, v_label))
    numbers = (scale, *map(float, settings.values()))
    return Lookahead(*_euler_lookahead(x_t, v_t, t, l, *others, label_dropped, *numbers, scales))


def inspect_cases():
    """(label, call): at the shipped shapes, for `python -m soflow_kernels.inspect`."""
    for shape in ((256, 4, 32, 32), (256, 3, 32, 32)):
        for dtype in (torch.float32, torch.bfloat16):
            v, t, drop = torch.empty(shape, dtype=dtype), torch.empty(256), torch.empty(256, dtype=torch.bool)
            size = f"{'x'.join(map(str, shape[1:]))} {str(dtype)[6:]}"
            for trig in (False, True):
                yield f"path_point {size} {'trig' if trig else 'linear'}", partial(_path_point, v, v, t, trig)
            yield f"euler_lookahead {size}", partial(_euler_lookahead, v, v, t, t, None, None, None, 1.0, 1.0, 1.0)
            given = (v, v, t, t, v, v, drop, 3.0, 0.8, 0.25)
            yield f"euler_lookahead {size} guided", partial(_euler_lookahead, *given)
            yield f"euler_lookahead {size} guided, each by its own scale", partial(_euler_lookahead, *given, t)
