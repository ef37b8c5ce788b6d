"""The path's point and velocity, the guided and mixed target, and the Euler look-ahead of SoFlow (arXiv 2512.15657).

    x_t = alpha(t) x_0 + beta(t) x_1,   v_t = alpha'(t) x_0 + beta'(t) x_1
    v_g = v_t + c(t) (w - 1) (v_t - v_null),   target = m v_g + (1 - m) v_label   (v_t where the label was dropped)
    dx = (l - t) target,   x_l = x_t + dx

Paths: "linear" 1 - t, t; "trig" cos(pi/2 t), sin(pi/2 t). w: guidance scale; m: mix ratio; c(t) = 1 up to t_d and
1 - exp(-0.025 d / (1 - d)), d = (1 - t) / (1 - t_d), after it. Images [B, ...] bfloat16, float16 or float32, float32
inside; t, l: [B]. The network's guidance passes lie between the two operations, so they are one launch each.

Noise drawn in the kernel is Philox 4x32-10 (Salmon et al. 2011) with the key `seed` and the counter (element, sample):
x_1 is a function of these alone, whatever the launch. Two of the four words make a normal number by Box and Muller.

Bytes, with S = one pass over [B, ...]: point 4 S (3 S with a seed); look-ahead 7 S (5 S without guidance). At
256 x 4 x 32 x 32 in float32 S is 4.2 MB: 4 and 7 microseconds at 4.3 TB/s; what counts is the number of launches.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from soflow_kernels._dispatch import check_tensor, jit, launch, tl, use_kernel
from soflow_kernels._rows import power_of_two

PATHS = ("linear", "trig")
BLOCK = 1024
HALF_PI = math.pi / 2
WORD = 0xFFFFFFFF


class PathPoint(NamedTuple):
    """What `path_point` returns, all like x0."""

    x_t: Tensor
    """The point at time t."""
    v_t: Tensor
    """Its velocity."""
    x_l: Tensor | None
    """x_t + (l - t) v_t, the look-ahead without guidance; None without l."""


class Lookahead(NamedTuple):
    """What `euler_lookahead` returns, all like x_t."""

    target: Tensor
    """The velocity target."""
    dx: Tensor
    """x_l - x_t, before it was rounded into x_l."""
    x_l: Tensor
    """The point at time l."""


def per_sample(value, like):
    """[B] -> [B, 1, ...], so that it multiplies `like`, in its dtype."""
    return value.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))


def guidance_decay(t, guidance_decay_time):
    """c(t), like t: 1 up to the decay time, then falling to almost 0 at t = 1."""
    if guidance_decay_time >= 1:
        return torch.ones_like(t)
    d = ((1 - t) / (1 - guidance_decay_time)).clamp(0, 1 - 1e-6)
    return torch.where(t <= guidance_decay_time, torch.ones_like(t), -torch.expm1(-0.025 * d / (1 - d)))


def guided_target(v_t, v_null, v_label, t, label_dropped, guidance_scale, guidance_decay_time, mix_ratio):
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


def _words(shape, seed, first_sample, device):
    """The first two Philox 4x32-10 words of every element, [B, n] int64."""
    B, n = shape[0], math.prod(shape[1:])
    c0 = torch.arange(n, device=device).expand(B, n)
    c1 = (torch.arange(B, device=device) + first_sample)[:, None].expand(B, n) & WORD
    c2 = c3 = torch.zeros_like(c0)
    seed = torch.as_tensor(seed, device=device)
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(10):
        # The product of two words fills 64 bits; the sign that int64 reads into it goes with the mask.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((b >> 32) & WORD) ^ c1 ^ k0, b & WORD, ((a >> 32) & WORD) ^ c3 ^ k1, a & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1


def noise_reference(shape, seed, first_sample=0, device="cpu", dtype=torch.float32):
    """The noise that `path_point` draws: normal numbers of `shape` [B, ...], a function of seed, sample and element."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    word0, word1 = (word.to(wide) for word in _words(shape, seed, first_sample, device))
    radius = torch.sqrt(-2 * torch.log((word0 + 0.5) * 2.0**-32))
    return (radius * torch.cos(2 * math.pi * (word1 * 2.0**-32))).reshape(shape).to(dtype)


def path_point_reference(x0, x1, t, l=None, *, seed=None, first_sample=0, path="linear"):
    """`path_point` in plain PyTorch: any device and dtype, differentiable."""
    if x1 is None:
        x1 = noise_reference(x0.shape, seed, first_sample, x0.device, x0.dtype)
    if path == "linear":
        coefficients = 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    else:
        cos, sin = torch.cos(HALF_PI * t), torch.sin(HALF_PI * t)
        coefficients = cos, sin, -HALF_PI * sin, HALF_PI * cos
    alpha, beta, dalpha, dbeta = (per_sample(c, x0) for c in coefficients)
    x_t, v_t = alpha * x0 + beta * x1, dalpha * x0 + dbeta * x1
    x_l = None if l is None else (x_t + v_t * per_sample(l - t, x_t)).to(x0.dtype)
    return PathPoint(x_t.to(x0.dtype), v_t.to(x0.dtype), x_l)


def euler_lookahead_reference(
    x_t, v_t, t, l, v_null=None, v_label=None, label_dropped=None, *,
    guidance_scale=1.0, guidance_decay_time=1.0, mix_ratio=1.0,
):  # fmt: skip
    """`euler_lookahead` in plain PyTorch: any device and dtype, differentiable in x_t and v_t."""
    target = guided_target(v_t, v_null, v_label, t, label_dropped, guidance_scale, guidance_decay_time, mix_ratio)
    dx = target * per_sample(l - t, x_t)
    return Lookahead(target.to(x_t.dtype), dx.to(x_t.dtype), (x_t + dx).to(x_t.dtype))


@jit
def sincos(quadrants):
    """(sin, cos) of pi/2 times the argument. The library's sine takes memory for its far range, this one does not."""
    k = tl.floor(quadrants + 0.5)
    a = (quadrants - k) * 1.5707963267948966  # in [-pi/4, pi/4]; the difference is exact
    y = a * a
    sin = a * (1 + y * (-1 / 6 + y * (1 / 120 + y * (-1 / 5040 + y * (1 / 362880)))))
    cos = 1 + y * (-1 / 2 + y * (1 / 24 + y * (-1 / 720 + y * (1 / 40320 + y * (-1 / 3628800)))))
    odd = k - 2 * tl.floor(0.5 * k)
    flip_sin = tl.floor(0.5 * k) - 2 * tl.floor(0.25 * k)  # 1 in the quadrants 2 and 3
    turned = tl.where(odd > 0.5, cos, sin)
    other = tl.where(odd > 0.5, -sin, cos)
    sign = 1 - 2 * flip_sin
    return sign * turned, sign * other


@jit
def _normal(seed, element, sample):
    """A standard normal number for each element of a sample."""
    element = element.to(tl.uint32)
    sample = sample.to(tl.uint32)
    zero = element * 0
    word0, word1, _, _ = tl.philox(seed, element, sample + zero, zero, zero)
    radius = tl.sqrt(-2 * tl.log((word0.to(tl.float32) + 0.5) * 2.3283064365386963e-10))
    _, cos = sincos(word1.to(tl.float32) * 9.313225746154785e-10)
    return radius * cos


@jit
def decay(t, t_d):
    """c(t). 1 - exp(-z) by its series where z is small."""
    d = tl.minimum(tl.maximum((1 - t) / (1 - t_d), 0.0), 0.999999)
    z = 0.025 * d / (1 - d)
    near = z * (1 - z * (1 / 2 - z * (1 / 6 - z * (1 / 24 - z * (1 / 120)))))
    far = tl.where(z < 0.1, near, 1 - tl.exp(-z))
    return tl.where(t <= t_d, 1.0, far)


@jit
def guided(v_t, v_null, v_label, strength, mix_ratio, dropped):
    """The target; `strength` is c(t) (w - 1)."""
    target = mix_ratio * (v_t + strength * (v_t - v_null)) + (1 - mix_ratio) * v_label
    return tl.where(dropped != 0, v_t, target)


@jit
def _point_kernel(
    x0_ptr, x1_ptr, t_ptr, l_ptr, seed_ptr, x_ptr, v_ptr, xl_ptr, seed, first_sample, n, blocks,
    TRIG: tl.constexpr, DRAWN: tl.constexpr, SEED_ON_DEVICE: tl.constexpr, AHEAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    b = program // blocks
    cols = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < n
    at = b * n + cols
    t = tl.load(t_ptr + b).to(tl.float32)
    x0 = tl.load(x0_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if DRAWN:
        if SEED_ON_DEVICE:
            key = tl.load(seed_ptr)
        else:
            key = seed
        x1 = _normal(key, cols, b + first_sample)
    else:
        x1 = tl.load(x1_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if TRIG:
        sin, cos = sincos(t)
        x = cos * x0 + sin * x1
        v = 1.5707963267948966 * (cos * x1 - sin * x0)
    else:
        x = (1 - t) * x0 + t * x1
        v = x1 - x0
    tl.store(x_ptr + at, x, mask=mask)
    tl.store(v_ptr + at, v, mask=mask)
    if AHEAD:
        l = tl.load(l_ptr + b).to(tl.float32)
        tl.store(xl_ptr + at, x + v * (l - t), mask=mask)


@jit
def _lookahead_kernel(
    x_ptr, v_ptr, null_ptr, label_ptr, dropped_ptr, t_ptr, l_ptr, target_ptr, dx_ptr, xl_ptr,
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
        target = guided(target, v_null, v_label, decay(t, t_d) * (scale - 1), mix, dropped)
    dx = target * (l - t)
    tl.store(target_ptr + at, target, mask=mask)
    tl.store(dx_ptr + at, dx, mask=mask)
    tl.store(xl_ptr + at, x + dx, mask=mask)


def layout(n):
    """(block, blocks a sample, warps): four elements a thread, a 16-byte load of float32."""
    block = min(BLOCK, power_of_two(max(n, 1)))
    return block, -(-n // block), max(block // 256, 1)


@torch.library.custom_op("soflow::path_point", mutates_args=())
def _path_point(
    x0: Tensor, x1: Tensor | None, t: Tensor, l: Tensor | None, seed_tensor: Tensor | None,
    seed: int, first_sample: int, trig: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x0, t = x0.contiguous(), t.contiguous()
    x, v = (torch.empty(x0.shape, dtype=x0.dtype, device=x0.device) for _ in range(2))
    ahead = torch.empty(x0.shape if l is not None else (0,), dtype=x0.dtype, device=x0.device)
    n = math.prod(x0.shape[1:])
    block, blocks, warps = layout(n)
    launch(
        _point_kernel, (x0.shape[0] * blocks,),
        x0, x0 if x1 is None else x1.contiguous(), t, t if l is None else l.contiguous(),
        t if seed_tensor is None else seed_tensor, x, v, ahead, seed, first_sample, n, blocks,
        TRIG=trig, DRAWN=x1 is None, SEED_ON_DEVICE=seed_tensor is not None, AHEAD=l is not None, BLOCK=block,
        num_warps=warps,
    )  # fmt: skip
    return x, v, ahead


@_path_point.register_fake
def _(x0, x1, t, l, seed_tensor, seed, first_sample, trig):
    return x0.new_empty(x0.shape), x0.new_empty(x0.shape), x0.new_empty(0 if l is None else x0.shape)


@torch.library.custom_op("soflow::euler_lookahead", mutates_args=())
def _euler_lookahead(
    x_t: Tensor, v_t: Tensor, t: Tensor, l: Tensor, v_null: Tensor | None, v_label: Tensor | None,
    label_dropped: Tensor | None, guidance_scale: float, guidance_decay_time: float, mix_ratio: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x_t, v_t = x_t.contiguous(), v_t.contiguous()
    outs = [torch.empty(x_t.shape, dtype=x_t.dtype, device=x_t.device) for _ in range(3)]
    n = math.prod(x_t.shape[1:])
    block, blocks, warps = layout(n)
    launch(
        _lookahead_kernel, (x_t.shape[0] * blocks,),
        x_t, v_t, v_t if v_null is None else v_null.contiguous(), v_t if v_label is None else v_label.contiguous(),
        t if label_dropped is None else label_dropped.contiguous().view(torch.uint8), t.contiguous(), l.contiguous(),
        *outs, n, blocks, float(guidance_scale), float(guidance_decay_time), float(mix_ratio),
        GUIDED=v_null is not None, MIXED=v_label is not None, DROPS=label_dropped is not None, BLOCK=block,
        num_warps=warps,
    )  # fmt: skip
    return outs[0], outs[1], outs[2]


@_euler_lookahead.register_fake
def _(x_t, v_t, t, l, v_null, v_label, label_dropped, guidance_scale, guidance_decay_time, mix_ratio):
    return x_t.new_empty(x_t.shape), x_t.new_empty(x_t.shape), x_t.new_empty(x_t.shape)


def _plain(*tensors):
    """Whether nothing asks for a gradient: these operations have no backward, their references do."""
    return not torch.is_grad_enabled() or not any(v is not None and v.requires_grad for v in tensors)


def check_mask(op, name, value, shape, like):
    """Raise ValueError unless `value` is None or a bool tensor of `shape` on the device of `like`."""
    if value is None:
        return
    if not isinstance(value, Tensor) or value.dtype != torch.bool or tuple(value.shape) != shape:
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{op}: {name} must be a bool tensor of shape {list(shape)} or None, got {got}")
    if value.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device}, got {value.device}")


def _check_seed(op, x1, seed, x0):
    if (x1 is None) == (seed is None):
        raise ValueError(f"{op}: give either x1 or seed, got {'neither' if x1 is None else 'both'}")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.dim():
            raise ValueError(
                f"{op}: seed must be an int or an int64 tensor of shape [], got {seed.dtype} {list(seed.shape)}"
            )
        if seed.device != x0.device:
            raise ValueError(f"{op}: seed must be on {x0.device}, got {seed.device}")
    elif seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63):
        raise ValueError(f"{op}: seed must be an int in [0, 2^63) or an int64 tensor, got {seed!r}")


def path_point(x0, x1, t, l=None, *, seed=None, first_sample=0, path="linear"):
    """x_t and v_t on the path from data x0 to noise x1, [B, ...] each, in one launch; with l also the unguided x_l.

    x0, x1: [B, ...], bfloat16, float16, float32 or float64; t, l: [B] in [0, 1]. x1 None: standard normal noise drawn
    in the kernel from `seed` (an int, or an int64 tensor [] on the device, which a CUDA graph reads anew) for the
    samples first_sample, first_sample + 1, ...: the same numbers for the same seed, sample and element on every device,
    to float32 rounding (`noise_reference`). Returns (x_t, v_t, x_l or None) in the dtype of x0.
    Differentiable, by the reference. Raises ValueError naming the argument that is wrong.
    """
    op = "path_point"
    check_tensor(op, "x0", x0, (..., "elements"))
    if x1 is not None:
        check_tensor(op, "x1", x1, tuple(x0.shape), x0)
    for name, value in (("t", t), ("l", l)):
        if name == "t" or value is not None:
            check_tensor(op, name, value, (x0.shape[0],), x0)
    _check_seed(op, x1, seed, x0)
    if isinstance(first_sample, bool) or not isinstance(first_sample, int) or first_sample < 0:
        raise ValueError(f"{op}: first_sample must be a whole number of at least 0, got {first_sample!r}")
    if path not in PATHS:
        raise ValueError(f"{op}: path must be one of {', '.join(PATHS)}, got {path!r}")
    if not (use_kernel(x0, x1, t, l) and _plain(x0, x1, t, l)):
        return path_point_reference(x0, x1, t, l, seed=seed, first_sample=first_sample, path=path)
    tensor = seed if isinstance(seed, Tensor) else None
    number = 0 if seed is None or tensor is not None else seed
    x_t, v_t, x_l = _path_point(x0, x1, t, l, tensor, number, first_sample, path == "trig")
    return PathPoint(x_t, v_t, None if l is None else x_l)


def euler_lookahead(
    x_t, v_t, t, l, v_null=None, v_label=None, label_dropped=None, *,
    guidance_scale=1.0, guidance_decay_time=1.0, mix_ratio=1.0,
):  # fmt: skip
    """The velocity target under guidance and mixing, and the Euler step along it from t to l: (target, dx, x_l).

    x_t, v_t: [B, ...], the point and velocity of the path, bfloat16, float16, float32 or float64; t, l: [B]. v_null,
    v_label: like x_t, the network's velocity without and with the label, taken without gradient; v_null None: no
    guidance, the target is v_t; v_label None: the mix ratio is 1. label_dropped: bool [B], where the target stays v_t;
    None: nowhere. Returns tensors like x_t.
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
    settings = {"guidance_scale": guidance_scale, "guidance_decay_time": guidance_decay_time, "mix_ratio": mix_ratio}
    if not (use_kernel(x_t, v_t, t, l, v_null, v_label) and _plain(x_t, v_t, t, l)):
        return euler_lookahead_reference(x_t, v_t, t, l, v_null, v_label, label_dropped, **settings)
    others = (None if v is None else v.detach() for v in (v_null, v_label))
    return Lookahead(*_euler_lookahead(x_t, v_t, t, l, *others, label_dropped, *map(float, settings.values())))


def inspect_cases():
    """(label, call): at the shipped shapes, for `python -m soflow_kernels.inspect`."""
    for shape in ((2, 4, 32, 32), (2, 3, 32, 32)):
        for dtype in (torch.float32, torch.bfloat16):
            v, t, drop = torch.zeros(shape, dtype=dtype), torch.zeros(2), torch.zeros(2, dtype=torch.bool)
            size = f"{'x'.join(map(str, shape[1:]))} {str(dtype)[6:]}"
            for trig in (False, True):
                name = f"path_point {size} {'trig' if trig else 'linear'}"
                yield name, partial(_path_point, v, v, t, None, None, 0, 0, trig)
                yield f"{name} seed", partial(_path_point, v, None, t, t, None, 3, 0, trig)
            yield f"euler_lookahead {size}", partial(_euler_lookahead, v, v, t, t, None, None, None, 1.0, 1.0, 1.0)
            yield f"euler_lookahead {size} guided", partial(_euler_lookahead, v, v, t, t, v, v, drop, 3.0, 0.8, 0.25)
