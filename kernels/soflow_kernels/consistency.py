"""The solution-consistency loss of SoFlow (arXiv 2512.15657): quotient, Huber-like weight, surrogate loss and gradient.

For each sample, with N_t = value, dN = increment = N_l - N_t and divided differences of the solution's coefficients,
so that nothing of the size of x is subtracted from its like:

    q = a(l, s) target + a' x + b' N_t - b(l, s) dN / (t - l),   a' = (a(t, s) - a(l, s)) / (t - l), b' likewise
      = (f(x_t, t, s) - f(x_l, l, s)) / (t - l)   for x_l = x_t + (l - t) target
    w = (mean(q^2) + eps)^-p, both without gradient
    loss = mean_i mean(sign(b(t, s)) output w q), gradient of output: sign(b) w q / (elements B)

"euler": a = 1, b = s - t, so q = target - N_t - (s - l) dN / (t - l). "trig": a and b are the cosine and the sine of
pi/2 (s - t). The value behind q is `output` itself, or one of its own where another pass computed it more exactly.
output, increment, x, target, value: [B, ...], bfloat16, float16 or float32, float32 inside; t, l, s: [B].

Bytes, with S = one pass over [B, ...]: forward 3 S read ("trig": 4; a value of its own: 1 more), 1 S written, one
launch of one program a sample, and a mean over B. Samples above 4096 elements take two launches of several programs a
sample, which read them twice. Backward 2 S: the stored direction is scaled. At 256 x 4 x 32 x 32 in float32 S is 4.2
MB: 4 microseconds at 4.3 TB/s.
"""

import math
from functools import partial

import torch
from torch import Tensor

from soflow_kernels._dispatch import check_tensor, jit, launch, tl, use_kernel
from soflow_kernels._rows import power_of_two
from soflow_kernels.lookahead import per_sample

COEFFICIENTS = ("euler", "trig")
BLOCK = 4096
CHUNKS = 64
"""Of a sample that does not fit one block: enough programs for small batches, few enough to add up in one load."""


def quotient(value, increment, x, target, t, l, s, coefficients="euler"):
    """q of the module's docstring in plain PyTorch, [B, ...], in the dtype of x and without gradient."""
    value, increment, x, target = (v.detach() for v in (value, increment, x, target))
    if coefficients == "euler":
        return target - value - per_sample((s - l) / (t - l), x) * increment
    # cos A - cos B = -2 sin((A + B)/2) sin((A - B)/2), sin A - sin B = 2 cos((A + B)/2) sin((A - B)/2)
    end, middle, half = math.pi / 2 * (s - l), math.pi / 2 * (s - (t + l) / 2), math.pi / 4 * (t - l)
    slope = torch.sinc(half / math.pi) * (math.pi / 2)  # 2 sin(half) / (t - l)
    q = per_sample(torch.cos(end), x) * target + per_sample(torch.sin(middle) * slope, x) * x
    return q - per_sample(torch.cos(middle) * slope, x) * value - per_sample(torch.sin(end) / (t - l), x) * increment


def consistency_loss_reference(
    output, increment, x, target, t, l, s, *, value=None, p=1.0, eps=0.01, coefficients="euler"
):
    """`consistency_loss` in plain PyTorch: any device and dtype."""
    images = (v.to(_wide(v)) for v in (output if value is None else value, increment, x, target))
    t, l, s = t.detach(), l.detach(), s.detach()
    q = quotient(*images, t, l, s, coefficients)
    error = per_sample_mean(q.square())
    weight = weight_of(error, eps, p)
    b = s - t if coefficients == "euler" else torch.sin(math.pi / 2 * (s - t))
    direction = per_sample(torch.sign(b) * weight, q) * q
    loss = per_sample_mean(output.to(q.dtype) * direction).mean()
    return loss, error.mean(), weight.mean()


@torch.library.custom_op("soflow::scaled_direction", mutates_args=())
def scaled_direction(direction: Tensor, output: Tensor, dloss: Tensor) -> Tensor:
    """The gradient of a loss with respect to `output`, from its stored direction. It has no formula of its own, so that
    a second derivative, of which the direction knows nothing, is refused."""
    return (direction.float() * (dloss / max(direction.numel(), 1))).to(direction.dtype)


@scaled_direction.register_fake
def _(direction, output, dloss):
    return torch.empty_like(direction)


def weight_of(error, eps, p):
    """1 / (error + eps)^p, without gradient; 1 for p = 0, whatever the error."""
    return torch.ones_like(error) if p == 0 else (error.detach() + eps) ** -p


def per_sample_mean(values):
    """[B, ...] -> [B]."""
    return values.reshape(len(values), -1).mean(1) if values.numel() else values.new_zeros(len(values))


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
    out_ptr, value_ptr, inc_ptr, x_ptr, target_ptr, at, mask, by_target, by_x, by_value, by_inc,
    TRIG: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    out = tl.load(out_ptr + at, mask=mask, other=0.0).to(tl.float32)
    value = out
    if VALUE:
        value = tl.load(value_ptr + at, mask=mask, other=0.0).to(tl.float32)
    q = by_value * value + by_inc * tl.load(inc_ptr + at, mask=mask, other=0.0).to(tl.float32)
    q += by_target * tl.load(target_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if TRIG:
        q += by_x * tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return out, q


@jit
def _coefficients(t_ptr, l_ptr, s_ptr, b, TRIG: tl.constexpr):
    """The sign of b(t, s), and what target, x, value and increment are multiplied by in q."""
    t = tl.load(t_ptr + b).to(tl.float32)
    l = tl.load(l_ptr + b).to(tl.float32)
    s = tl.load(s_ptr + b).to(tl.float32)
    if TRIG:
        quarter = 1.5707963267948966
        end = quarter * (s - l)
        middle = quarter * (s - 0.5 * (t + l))
        slope = quarter * _sinc(0.5 * quarter * (t - l))
        by_target = _cos(end)
        by_x = middle * _sinc(middle) * slope
        by_value = -_cos(middle) * slope
        by_inc = -end * _sinc(end) / (t - l)
    else:
        by_target = 1.0
        by_x = 0.0
        by_value = -1.0
        by_inc = -(s - l) / (t - l)
    b_ts = s - t  # has the sign of its sine too
    sign = tl.where(b_ts > 0, 1.0, tl.where(b_ts < 0, -1.0, b_ts))
    return sign, by_target, by_x, by_value, by_inc


@jit
def power(a, p):
    """a^-p for a >= 0; 1 for p = 0, whatever a is."""
    return tl.where(p == 0, 1.0, tl.exp(-p * tl.log(a)))


@jit
def _write_sample(sample_ptr, b, B, error, product, sign, p, eps):
    """Store loss, mean q^2 and weight of a sample; returns sign times weight."""
    weight = power(error + eps, p)
    tl.store(sample_ptr + b, sign * weight * product)
    tl.store(sample_ptr + B + b, error)
    tl.store(sample_ptr + 2 * B + b, weight)
    return sign * weight


@jit
def _sample_kernel(
    out_ptr, value_ptr, inc_ptr, x_ptr, target_ptr, t_ptr, l_ptr, s_ptr, direction_ptr, sample_ptr, n, B, p, eps,
    TRIG: tl.constexpr, VALUE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one sample, in registers."""
    b = tl.program_id(0).to(tl.int64)
    sign, by_target, by_x, by_value, by_inc = _coefficients(t_ptr, l_ptr, s_ptr, b, TRIG)
    cols = tl.arange(0, BLOCK)
    at = b * n + cols
    out, q = _quotient(
        out_ptr, value_ptr, inc_ptr, x_ptr, target_ptr, at, cols < n, by_target, by_x, by_value, by_inc, TRIG, VALUE
    )  # fmt: skip
    error = tl.sum(q * q, axis=0) / n
    scale = _write_sample(sample_ptr, b, B, error, tl.sum(out * q, axis=0) / n, sign, p, eps)
    tl.store(direction_ptr + at, scale * q, mask=cols < n)


@jit
def _sums_kernel(
    out_ptr, value_ptr, inc_ptr, x_ptr, target_ptr, t_ptr, l_ptr, s_ptr, partial_ptr, n, B, chunks, rows,
    TRIG: tl.constexpr, VALUE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the sums of q^2 and of output q over a chunk of `rows` blocks of a sample."""
    program = tl.program_id(0).to(tl.int64)
    b = program // chunks
    _, by_target, by_x, by_value, by_inc = _coefficients(t_ptr, l_ptr, s_ptr, b, TRIG)
    squares = tl.zeros([BLOCK], tl.float32)
    products = tl.zeros([BLOCK], tl.float32)
    for row in range(rows):
        cols = (program % chunks * rows + row) * BLOCK + tl.arange(0, BLOCK)
        out, q = _quotient(
            out_ptr, value_ptr, inc_ptr, x_ptr, target_ptr, b * n + cols, cols < n,
            by_target, by_x, by_value, by_inc, TRIG, VALUE,
        )  # fmt: skip
        squares += q * q
        products += out * q
    tl.store(partial_ptr + program, tl.sum(squares, axis=0))
    tl.store(partial_ptr + B * chunks + program, tl.sum(products, axis=0))


@jit
def _direction_kernel(
    out_ptr, value_ptr, inc_ptr, x_ptr, target_ptr, t_ptr, l_ptr, s_ptr, direction_ptr, sample_ptr, partial_ptr,
    n, B, chunks, rows, p, eps,
    TRIG: tl.constexpr, VALUE: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the direction of a chunk, from the sums of all chunks of its sample."""
    program = tl.program_id(0).to(tl.int64)
    b = program // chunks
    sign, by_target, by_x, by_value, by_inc = _coefficients(t_ptr, l_ptr, s_ptr, b, TRIG)
    error = sum_chunks(partial_ptr + b * chunks, chunks, CHUNKS) / n
    product = sum_chunks(partial_ptr + (B + b) * chunks, chunks, CHUNKS) / n
    # Every chunk's program stores the same three numbers.
    scale = _write_sample(sample_ptr, b, B, error, product, sign, p, eps)
    for row in range(rows):
        cols = (program % chunks * rows + row) * BLOCK + tl.arange(0, BLOCK)
        _, q = _quotient(
            out_ptr, value_ptr, inc_ptr, x_ptr, target_ptr, b * n + cols, cols < n,
            by_target, by_x, by_value, by_inc, TRIG, VALUE,
        )  # fmt: skip
        tl.store(direction_ptr + b * n + cols, scale * q, mask=cols < n)


@jit
def sum_chunks(partial_ptr, chunks, CHUNKS: tl.constexpr):
    """The sum of a sample's partial sums, in an order that depends on their number alone."""
    each = tl.arange(0, CHUNKS)
    return tl.sum(tl.load(partial_ptr + each, mask=each < chunks, other=0.0), axis=0)


def split(n):
    """(chunks, blocks a chunk, block, warps) of a sample of n elements; one chunk is the kernel of one launch."""
    if n <= BLOCK:
        block = power_of_two(max(n, 1))
        return 1, 1, block, max(block // 256, 1)
    block = BLOCK // 2
    blocks = -(-n // block)
    rows = -(-blocks // CHUNKS)
    return -(-blocks // rows), rows, block, 4


@torch.library.custom_op("soflow::consistency_loss", mutates_args=())
def _consistency_loss(
    output: Tensor, value: Tensor | None, increment: Tensor, x: Tensor, target: Tensor,
    t: Tensor, l: Tensor, s: Tensor, p: float, eps: float, trig: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B = output.shape[0]
    n = math.prod(output.shape[1:])
    has_value = value is not None
    output, increment, x, target = (v.contiguous() for v in (output, increment, x, target))
    direction = torch.empty(output.shape, dtype=output.dtype, device=output.device)
    samples = torch.empty(3, B, dtype=torch.float32, device=output.device)
    value = output if value is None else value.contiguous()
    given = (output, value, increment, x, target, t.contiguous(), l.contiguous(), s.contiguous())
    chunks, rows, block, warps = split(n)
    options = {"TRIG": trig, "VALUE": has_value, "BLOCK": block, "num_warps": warps}
    if chunks == 1:
        launch(_sample_kernel, (B,), *given, direction, samples, n, B, float(p), float(eps), **options)
    else:
        partials = torch.empty(2, B, chunks, dtype=torch.float32, device=output.device)
        launch(_sums_kernel, (B * chunks,), *given, partials, n, B, chunks, rows, **options)
        launch(
            _direction_kernel, (B * chunks,), *given, direction, samples, partials, n, B, chunks, rows,
            float(p), float(eps), CHUNKS=power_of_two(chunks), **options,
        )  # fmt: skip
    return samples.mean(1), direction


@_consistency_loss.register_fake
def _(output, value, increment, x, target, t, l, s, p, eps, trig):
    return output.new_empty(3, dtype=torch.float32), output.new_empty(output.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(output[1], inputs[0])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _grad(ctx, dmeans, _direction):
    if dmeans is None:
        return (None,) * 11
    return scaled_direction(*ctx.saved_tensors, dmeans[0]), *(None,) * 10


_consistency_loss.register_autograd(_grad, setup_context=_save)


def consistency_loss(output, increment, x, target, t, l, s, *, value=None, p=1.0, eps=0.01, coefficients="euler"):
    """The consistency loss from the network's value and increment; returns scalars (loss, mean q^2, mean weight).

    output: N(x_t, t, s), [B, ...], the only argument with a gradient. Of its shape: increment,
    N(x_l, l, s) - N(x_t, t, s); x, the point x_t; target, the velocity target; value, what q
    takes for N(x_t, t, s), None: output. t, l, s: [B] in [0, 1], s <= l < t.
    float64 takes the reference. The scalars are float32 (float64 for float64) and only the loss has a gradient, once;
    its value means nothing, it is a surrogate.
    Raises ValueError naming the argument whose type, shape, dtype or device is wrong.
    """
    op = "consistency_loss"
    check_tensor(op, "output", output, (..., "elements"))
    for name, tensor in (("increment", increment), ("x", x), ("target", target), ("value", value)):
        if name != "value" or tensor is not None:
            check_tensor(op, name, tensor, tuple(output.shape), output)
    for name, tensor in (("t", t), ("l", l), ("s", s)):
        check_tensor(op, name, tensor, (output.shape[0],), output)
    if coefficients not in COEFFICIENTS:
        raise ValueError(f"{op}: coefficients must be one of {', '.join(COEFFICIENTS)}, got {coefficients!r}")
    if not use_kernel(output, increment, x, target, t, l, s, value):
        settings = {"value": value, "p": p, "eps": eps, "coefficients": coefficients}
        return consistency_loss_reference(output, increment, x, target, t, l, s, **settings)
    value = None if value is None else value.detach()
    others = (v.detach() for v in (increment, x, target, t, l, s))
    means, _ = _consistency_loss(output, value, *others, float(p), float(eps), coefficients == "trig")
    _, error, weight = means.detach().unbind()
    return means[0], error, weight


def inspect_cases():
    """(label, call): at the shipped shapes, for `python -m soflow_kernels.inspect`."""
    for shape in ((2, 4, 32, 32), (2, 3, 64, 64)):
        for dtype in (torch.float32, torch.bfloat16):
            v, t = torch.zeros(shape, dtype=dtype), torch.zeros(2)
            for trig in (False, True):
                size = f"{'x'.join(map(str, shape[1:]))} {'trig' if trig else 'euler'} {str(dtype)[6:]}"
                for name, value in (("", None), (" value", v)):
                    call = partial(_consistency_loss, v, value, v, v, v, t, t, t, 1.0, 0.01, trig)
                    yield f"consistency_loss {size}{name}", call
