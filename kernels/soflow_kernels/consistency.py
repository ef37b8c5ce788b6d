"""The solution-consistency loss of SoFlow (arXiv 2512.15657): quotient, Huber-like weight, surrogate loss and gradient.

For each sample, with N_t = output, dN = increment = N_l - N_t and divided differences of the solution's coefficients:

    q = a(l, s) target + a' x + b' N_t - b(l, s) dN / (t - l),   a' = (a(t, s) - a(l, s)) / (t - l), b' likewise
    w = (mean(q^2) + eps)^-p
    loss = mean_i mean(sign(b(t, s)) N_t w q), gradient of N_t: sign(b) w q / (elements B)

"euler": a = 1, b = s - t, so q = target - N_t - (s - l) dN / (t - l). "trig": a and b are the cosine and the sine of
pi/2 (s - t).
output, increment, x, target: [B, ...], bfloat16, float16 or float32, float32 inside; t, l, s: [B].

Bytes, with S = one pass over [B, ...]: forward 3 S read ("trig": 4), 1 S written, one launch of one program a sample,
and a mean over B; samples above 4096 elements are read twice, the second time from the cache. Backward 2 S: the stored
direction is scaled. At 256 x 4 x 32 x 32 in float32 S is 4.2 MB: 4 microseconds at 4.3 TB/s.
"""

import math
from functools import partial

import torch
from torch import Tensor

from soflow_kernels._dispatch import check_tensor, jit, launch, tl, use_kernel
from soflow_kernels._rows import power_of_two

COEFFICIENTS = ("euler", "trig")
BLOCK = 4096


def _per_sample(value, like):
    return value.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))


def consistency_loss_reference(output, increment, x, target, t, l, s, *, p=1.0, eps=0.01, coefficients="euler"):
    """`consistency_loss` in plain PyTorch: any device and dtype."""
    value, increment, x, target = (v.detach().to(_wide(v)) for v in (output, increment, x, target))
    if coefficients == "euler":
        q = target - value - _per_sample((s - l) / (t - l), value) * increment
        sign = torch.sign(s - t)
    else:
        end, middle, half = math.pi / 2 * (s - l), math.pi / 2 * (s - (t + l) / 2), math.pi / 4 * (t - l)
        slope = torch.sinc(half / math.pi) * (math.pi / 2)
        q = _per_sample(torch.cos(end), x) * target + _per_sample(torch.sin(middle) * slope, x) * x
        q = q - _per_sample(torch.cos(middle) * slope, x) * value - _per_sample(torch.sin(end) / (t - l), x) * increment
        sign = torch.sign(torch.sin(math.pi / 2 * (s - t)))
    error = q.square().flatten(1).mean(1)
    weight = (error + eps) ** -p
    direction = _per_sample(sign * weight, q) * q
    loss = (output.to(q.dtype) * direction).flatten(1).mean(1).mean()
    return loss, error.mean(), weight.mean()


def _wide(tensor):
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@jit
def _sinc(a):
    """sin(a) / a for |a| <= pi/2, where times in [0, 1] keep it; the library's sine takes memory for its far range."""
    y = a * a
    poly = -1 / 39916800 + y * (1 / 6227020800)
    poly = 1 / 362880 + y * poly
    poly = -1 / 5040 + y * poly
    poly = 1 / 120 + y * poly
    poly = -1 / 6 + y * poly
    return 1 + y * poly


@jit
def _cos(a):
    y = a * a
    poly = -1 / 3628800 + y * (1 / 479001600)
    poly = 1 / 40320 + y * poly
    poly = -1 / 720 + y * poly
    poly = 1 / 24 + y * poly
    poly = -1 / 2 + y * poly
    return 1 + y * poly


@jit
def _quotient(
    out_ptr, inc_ptr, x_ptr, target_ptr, at, mask, by_target, by_x, by_out, by_inc, TRIG: tl.constexpr,
):  # fmt: skip
    out = tl.load(out_ptr + at, mask=mask, other=0.0).to(tl.float32)
    q = by_out * out + by_inc * tl.load(inc_ptr + at, mask=mask, other=0.0).to(tl.float32)
    q += by_target * tl.load(target_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if TRIG:
        q += by_x * tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return out, q


@jit
def _kernel(
    out_ptr, inc_ptr, x_ptr, target_ptr, t_ptr, l_ptr, s_ptr, direction_ptr, sample_ptr, n, B, p, eps,
    TRIG: tl.constexpr, SINGLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one sample, kept in registers where it fits one block."""
    b = tl.program_id(0).to(tl.int64)
    t = tl.load(t_ptr + b).to(tl.float32)
    l = tl.load(l_ptr + b).to(tl.float32)
    s = tl.load(s_ptr + b).to(tl.float32)
    if TRIG:
        quarter = 1.5707963267948966
        end = quarter * (s - l)
        middle = quarter * (s - 0.5 * (t + l))
        half = 0.5 * quarter * (t - l)
        slope = quarter * _sinc(half)
        by_target = _cos(end)
        by_x = middle * _sinc(middle) * slope
        by_out = -_cos(middle) * slope
        by_inc = -end * _sinc(end) / (t - l)
        b_ts = s - t  # of the sign of the sine
    else:
        by_target = 1.0
        by_x = 0.0
        by_out = -1.0
        by_inc = -(s - l) / (t - l)
        b_ts = s - t
    sign = tl.where(b_ts > 0, 1.0, tl.where(b_ts < 0, -1.0, b_ts))
    cols = tl.arange(0, BLOCK)
    base = b * n
    if SINGLE:
        mask = cols < n
        at = base + cols
        out, q = _quotient(
            out_ptr, inc_ptr, x_ptr, target_ptr, at, mask, by_target, by_x, by_out, by_inc, TRIG
        )  # fmt: skip
        error = tl.sum(q * q, axis=0) / n
        weight = tl.exp(-p * tl.log(error + eps))
        direction = sign * weight * q
        tl.store(direction_ptr + at, direction, mask=mask)
        loss = tl.sum(out * direction, axis=0) / n
    else:
        squares = tl.zeros([BLOCK], tl.float32)
        for first in range(0, n, BLOCK):
            at = first + cols
            out, q = _quotient(
                out_ptr, inc_ptr, x_ptr, target_ptr, base + at, at < n, by_target, by_x, by_out, by_inc, TRIG
            )  # fmt: skip
            squares += q * q
        error = tl.sum(squares, axis=0) / n
        weight = tl.exp(-p * tl.log(error + eps))
        products = tl.zeros([BLOCK], tl.float32)
        for first in range(0, n, BLOCK):
            at = first + cols
            out, q = _quotient(
                out_ptr, inc_ptr, x_ptr, target_ptr, base + at, at < n, by_target, by_x, by_out, by_inc, TRIG
            )  # fmt: skip
            direction = sign * weight * q
            tl.store(direction_ptr + base + at, direction, mask=at < n)
            products += out * direction
        loss = tl.sum(products, axis=0) / n
    tl.store(sample_ptr + b, loss)
    tl.store(sample_ptr + B + b, error)
    tl.store(sample_ptr + 2 * B + b, weight)


@torch.library.custom_op("soflow::consistency_loss", mutates_args=())
def _consistency_loss(
    output: Tensor, increment: Tensor, x: Tensor, target: Tensor, t: Tensor, l: Tensor, s: Tensor,
    p: float, eps: float, trig: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B = output.shape[0]
    n = output[0].numel() if B else 0
    output, increment, x, target = (v.contiguous() for v in (output, increment, x, target))
    direction = torch.empty(output.shape, dtype=output.dtype, device=output.device)
    samples = torch.empty(3, B, dtype=torch.float32, device=output.device)
    block = min(BLOCK, power_of_two(max(n, 1)))
    launch(
        _kernel, (B,), output, increment, x, target, t.contiguous(), l.contiguous(), s.contiguous(), direction, samples,
        n, B, float(p), float(eps), TRIG=trig, SINGLE=n <= BLOCK, BLOCK=block, num_warps=min(max(block // 512, 1), 8),
    )  # fmt: skip
    return samples.mean(1), direction


@_consistency_loss.register_fake
def _(output, increment, x, target, t, l, s, p, eps, trig):
    return output.new_empty(3, dtype=torch.float32), output.new_empty(output.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _grad(ctx, dmeans, _direction):
    if dmeans is None:
        return (None,) * 10
    (direction,) = ctx.saved_tensors
    grad = (direction.float() * (dmeans[0] / max(direction.numel(), 1))).to(direction.dtype)
    return grad, *(None,) * 9


_consistency_loss.register_autograd(_grad, setup_context=_save)


def consistency_loss(output, increment, x, target, t, l, s, *, p=1.0, eps=0.01, coefficients="euler"):
    """The consistency loss from the network's value and increment; returns scalars (loss, mean q^2, mean weight).

    output: N(x_t, t, s), [B, ...], the only argument with a gradient. Of its shape: increment,
    N(x_l, l, s) - N(x_t, t, s); x, the point x_t; target, the velocity target. t, l, s: [B] in [0, 1], s <= l < t.
    float64 takes the reference. The scalars are float32 (float64 for float64) and only the loss has a gradient; its
    value means nothing, it is a surrogate.
    Raises ValueError naming the argument whose type, shape, dtype or device is wrong.
    """
    op = "consistency_loss"
    check_tensor(op, "output", output, (..., "elements"))
    for name, value in (("increment", increment), ("x", x), ("target", target)):
        check_tensor(op, name, value, tuple(output.shape), output)
    for name, value in (("t", t), ("l", l), ("s", s)):
        check_tensor(op, name, value, (output.shape[0],), output)
    if coefficients not in COEFFICIENTS:
        raise ValueError(f"{op}: coefficients must be one of {', '.join(COEFFICIENTS)}, got {coefficients!r}")
    if not use_kernel(output, increment, x, target, t, l, s):
        return consistency_loss_reference(
            output, increment, x, target, t, l, s, p=p, eps=eps, coefficients=coefficients
        )
    others = (v.detach() for v in (increment, x, target, t, l, s))
    means, _ = _consistency_loss(output, *others, p, eps, coefficients == "trig")
    _, error, weight = means.detach().unbind()
    return means[0], error, weight


def inspect_cases():
    """(label, call): at the shipped shapes, for `python -m soflow_kernels.inspect`."""
    for shape in ((2, 4, 32, 32), (2, 3, 64, 64)):
        for dtype in (torch.float32, torch.bfloat16):
            v, t = torch.zeros(shape, dtype=dtype), torch.zeros(2)
            for trig in (False, True):
                size = f"{'x'.join(map(str, shape[1:]))} {'trig' if trig else 'euler'} {str(dtype)[6:]}"
                yield f"consistency_loss {size}", partial(_consistency_loss, v, v, v, v, t, t, t, 1.0, 0.01, trig)
