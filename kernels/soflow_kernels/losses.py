"""The two losses of SoFlow (arXiv 2512.15657), each with its target, adaptive weight and gradient in one launch.

Both compare every sample's output with a target without gradient, by an error e, and divide by (mean(e^2) + eps)^p:

Flow matching, with v = k N(x_t, t, t) the network's velocity and k = db/ds(t, t) (1 for Euler, pi/2 for trig):

    v_g = v_t + c(t) (w - 1) (v_t - v_null),   target = m v_g + (1 - m) sg(v)   (v_t where the label was dropped)
    e = v - target,   omega = 1 / (|k| (mean(e^2) + eps)^p)
    loss = mean_i omega_i mean(e_i^2),   gradient of N: 2 k omega e / (elements B)

Solution consistency, with N_t = value, dN = increment = N_l - N_t, and divided differences of the solution's
coefficients, so that nothing of the size of x is subtracted from its like:

    e = q = a(l, s) target + a' x + b' N_t - b(l, s) dN / (t - l),   a' = (a(t, s) - a(l, s)) / (t - l), b' likewise
          = (f(x_t, t, s) - f(x_l, l, s)) / (t - l)   for x_l = x_t + (l - t) target
    omega = (mean(q^2) + eps)^-p
    loss = mean_i mean(sign(b(t, s)) N omega q),   gradient of N: sign(b) omega q / (elements B)

"euler": a = 1, b = s - t, so q = target - N_t - (s - l) dN / (t - l). "trig": a and b are the cosine and the sine of
pi/2 (s - t). The value behind q is `output` itself, or one of its own where another pass computed it more exactly.

Images are [B, ...], bfloat16, float16 or float32, float32 inside; times are [B].

Bytes, with S = one pass over [B, ...]: forward 3 S read (flow matching without guidance: 2 S; consistency with "trig"
or with a value of its own: 1 S more each), 1 S written, one launch of one program a sample, and a mean over B. Samples
above 4096 elements take two launches of several programs a sample, which read them twice. Backward 2 S: the stored
direction is scaled. At 256 x 4 x 32 x 32 in float32 S is 4.2 MB: 4 microseconds at 4.3 TB/s.
"""

import math
from functools import partial

import torch
from torch import Tensor

from soflow_kernels._dispatch import check_tensor, jit, launch, operation, tl, use_kernel
from soflow_kernels._math import sincos_of_quarters
from soflow_kernels._rows import power_of_two
from soflow_kernels.lookahead import check_mask, decay, guided, guided_target, per_sample, split_scale

COEFFICIENTS = ("euler", "trig")
BLOCK = 4096
CHUNKS = 64
"""Chunks of a sample that does not fit one block: enough programs for small batches, few enough to add in one load."""


def quotient(
    value: Tensor, increment: Tensor, x: Tensor, target: Tensor, t: Tensor, l: Tensor, s: Tensor,
    coefficients: str = "euler",
) -> Tensor:  # fmt: skip
    """The divided difference q of the module's docstring in plain PyTorch, without gradient.

    value, increment, x, target: [B, ...]; t, l, s: [B]. Returns [B, ...] in the dtype of x.
    """
    value, increment, x, target = (v.detach() for v in (value, increment, x, target))
    if coefficients == "euler":
        return target - value - per_sample((s - l) / (t - l), x) * increment
    # cos A - cos B = -2 sin((A + B)/2) sin((A - B)/2), sin A - sin B = 2 cos((A + B)/2) sin((A - B)/2)
    end, middle, half = math.pi / 2 * (s - l), math.pi / 2 * (s - (t + l) / 2), math.pi / 4 * (t - l)
    slope = torch.sinc(half / math.pi) * (math.pi / 2)  # 2 sin(half) / (t - l)
    q = per_sample(torch.cos(end), x) * target + per_sample(torch.sin(middle) * slope, x) * x
    return q - per_sample(torch.cos(middle) * slope, x) * value - per_sample(torch.sin(end) / (t - l), x) * increment


def consistency_loss_reference(
    output: Tensor, increment: Tensor, x: Tensor, target: Tensor, t: Tensor, l: Tensor, s: Tensor, *,
    value: Tensor | None = None, p: float = 1.0, eps: float = 0.01, coefficients: str = "euler",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`consistency_loss` in plain PyTorch: any device and dtype."""
    images = (v.to(_wide(v)) for v in (output if value is None else value, increment, x, target))
    t, l, s = t.detach(), l.detach(), s.detach()
    q = quotient(*images, t, l, s, coefficients)
    error = _per_sample_mean(q.square())
    weight = _weight(error, eps, p)
    b = s - t if coefficients == "euler" else torch.sin(math.pi / 2 * (s - t))
    direction = per_sample(torch.sign(b) * weight, q) * q
    loss = _per_sample_mean(output.to(q.dtype) * direction).mean()
    return loss, error.mean(), weight.mean()


def flow_matching_loss_reference(
    output: Tensor, v_t: Tensor, t: Tensor, v_null: Tensor | None = None, label_dropped: Tensor | None = None, *,
    guidance_scale: float | Tensor = 1.0, guidance_decay_time: float = 1.0, mix_ratio: float = 1.0,
    p: float = 1.0, eps: float = 0.01, velocity_slope: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`flow_matching_loss` in plain PyTorch: any device and dtype."""
    wide = _wide(output)
    v, v_t, t = velocity_slope * output.to(wide), v_t.detach().to(wide), t.detach()
    v_null, v_label = (None, None) if v_null is None else (v_null.to(wide), v)
    target = guided_target(v_t, v_null, v_label, t, label_dropped, guidance_scale, guidance_decay_time, mix_ratio)
    error = _per_sample_mean((v - target).square())
    weight = _weight(error, eps, p) / abs(velocity_slope)
    return (weight * error).mean(), error.detach().mean(), weight.mean()


def _weight(error: Tensor, eps: float, p: float) -> Tensor:
    """1 / (error + eps)^p, without gradient; 1 for p = 0, whatever the error."""
    return torch.ones_like(error) if p == 0 else (error.detach() + eps) ** -p


def _per_sample_mean(values: Tensor) -> Tensor:
    """[B, ...] -> [B]; 0 for samples of no elements."""
    rows = values.reshape(len(values), math.prod(values.shape[1:]))
    return rows.mean(1) if rows.shape[1] else rows.sum(1)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


# The kernels. Each loss has three of the same shape: `_sample` does a sample in one program; a sample above BLOCK
# elements is cut into `chunks` programs, of which `_sums` adds up the errors and `_direction` writes the gradient.
#
#   b           the sample, of B; n: its elements; at = b n + cols: their places in the images
#   rows        blocks of BLOCK elements that a program of a chunk goes through, one after another
#   sample_ptr  [3, B] float32: loss, mean square of the error, weight of each sample
#   partial_ptr [B, sums, chunks] float32: sums over a chunk
#   images, times, settings: tuples of pointers and numbers, for the functions that the three kernels share


@jit
def _power(a, p):
    """a^-p for a >= 0; 1 for p = 0, whatever a is."""
    return tl.where(p == 0, 1.0, tl.exp(-p * tl.log(a)))


@jit
def _store_sample(sample_ptr, b, B, loss, error, weight):
    tl.store(sample_ptr + b, loss)
    tl.store(sample_ptr + B + b, error)
    tl.store(sample_ptr + 2 * B + b, weight)


@jit
def _sum_chunks(partial_ptr, chunks, CHUNKS: tl.constexpr):
    """The sum of a sample's partial sums, in an order that depends on their number alone."""
    each = tl.arange(0, CHUNKS)
    return tl.sum(tl.load(partial_ptr + each, mask=each < chunks, other=0.0), axis=0)


@jit
def _quotient(images, by, at, mask, TRIG: tl.constexpr, VALUE: tl.constexpr):
    """The output and q."""
    out_ptr, value_ptr, inc_ptr, x_ptr, target_ptr = images
    by_target, by_x, by_value, by_inc = by
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
def _coefficients(times, b, TRIG: tl.constexpr):
    """The sign of b(t, s), and what target, x, value and increment are multiplied by in q."""
    t_ptr, l_ptr, s_ptr = times
    t = tl.load(t_ptr + b).to(tl.float32)
    l = tl.load(l_ptr + b).to(tl.float32)
    s = tl.load(s_ptr + b).to(tl.float32)
    if TRIG:
        end_sin, end_cos = sincos_of_quarters(s - l)
        middle_sin, middle_cos = sincos_of_quarters(s - 0.5 * (t + l))
        half_sin, _ = sincos_of_quarters(0.5 * (t - l))
        slope = 2 * half_sin / (t - l)
        by_target = end_cos
        by_x = middle_sin * slope
        by_value = -middle_cos * slope
        by_inc = -end_sin / (t - l)
    else:
        by_target = 1.0
        by_x = 0.0
        by_value = -1.0
        by_inc = -(s - l) / (t - l)
    b_ts = s - t  # has the sign of its sine too
    sign = tl.where(b_ts > 0, 1.0, tl.where(b_ts < 0, -1.0, b_ts))
    return sign, by_target, by_x, by_value, by_inc


@jit
def _consistency_sample(
    out_ptr, value_ptr, inc_ptr, x_ptr, target_ptr, t_ptr, l_ptr, s_ptr, direction_ptr, sample_ptr, n, p, eps,
    TRIG: tl.constexpr, VALUE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    images = (out_ptr, value_ptr, inc_ptr, x_ptr, target_ptr)
    b = tl.program_id(0).to(tl.int64)
    sign, by_target, by_x, by_value, by_inc = _coefficients((t_ptr, l_ptr, s_ptr), b, TRIG)
    cols = tl.arange(0, BLOCK)
    at = b * n + cols
    out, q = _quotient(images, (by_target, by_x, by_value, by_inc), at, cols < n, TRIG, VALUE)
    error = tl.sum(q * q, axis=0) / n
    weight = _power(error + eps, p)
    scale = sign * weight
    _store_sample(sample_ptr, b, tl.num_programs(0), scale * (tl.sum(out * q, axis=0) / n), error, weight)
    tl.store(direction_ptr + at, scale * q, mask=cols < n)


@jit
def _consistency_sums(
    out_ptr, value_ptr, inc_ptr, x_ptr, target_ptr, t_ptr, l_ptr, s_ptr, partial_ptr, n, chunks, rows,
    TRIG: tl.constexpr, VALUE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Two sums over a chunk: of q^2 and of output q."""
    images = (out_ptr, value_ptr, inc_ptr, x_ptr, target_ptr)
    program = tl.program_id(0).to(tl.int64)
    b = program // chunks
    _, by_target, by_x, by_value, by_inc = _coefficients((t_ptr, l_ptr, s_ptr), b, TRIG)
    squares = tl.zeros([BLOCK], tl.float32)
    products = tl.zeros([BLOCK], tl.float32)
    for row in range(rows):
        cols = (program % chunks * rows + row) * BLOCK + tl.arange(0, BLOCK)
        out, q = _quotient(images, (by_target, by_x, by_value, by_inc), b * n + cols, cols < n, TRIG, VALUE)
        squares += q * q
        products += out * q
    at = partial_ptr + b * chunks + program
    tl.store(at, tl.sum(squares, axis=0))
    tl.store(at + chunks, tl.sum(products, axis=0))


@jit
def _consistency_direction(
    out_ptr, value_ptr, inc_ptr, x_ptr, target_ptr, t_ptr, l_ptr, s_ptr, direction_ptr, sample_ptr, partial_ptr,
    n, chunks, rows, p, eps,
    TRIG: tl.constexpr, VALUE: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    images = (out_ptr, value_ptr, inc_ptr, x_ptr, target_ptr)
    program = tl.program_id(0).to(tl.int64)
    b = program // chunks
    sign, by_target, by_x, by_value, by_inc = _coefficients((t_ptr, l_ptr, s_ptr), b, TRIG)
    error = _sum_chunks(partial_ptr + 2 * b * chunks, chunks, CHUNKS) / n
    product = _sum_chunks(partial_ptr + (2 * b + 1) * chunks, chunks, CHUNKS) / n
    weight = _power(error + eps, p)
    scale = sign * weight
    # Every chunk's program stores the same three numbers.
    _store_sample(sample_ptr, b, tl.num_programs(0) // chunks, scale * product, error, weight)
    for row in range(rows):
        cols = (program % chunks * rows + row) * BLOCK + tl.arange(0, BLOCK)
        _, q = _quotient(images, (by_target, by_x, by_value, by_inc), b * n + cols, cols < n, TRIG, VALUE)
        tl.store(direction_ptr + b * n + cols, scale * q, mask=cols < n)


@jit
def _guidance(t_ptr, dropped_ptr, scales_ptr, b, scale, t_d, GUIDED: tl.constexpr, DROPS: tl.constexpr):
    """c(t) (w - 1), and whether the label was dropped, of a sample."""
    strength = 0.0
    dropped = 0
    if GUIDED:
        if scales_ptr is not None:
            scale = tl.load(scales_ptr + b).to(tl.float32)
        strength = decay(tl.load(t_ptr + b).to(tl.float32), t_d) * (scale - 1)
        if DROPS:
            dropped = tl.load(dropped_ptr + b).to(tl.int32)
    return strength, dropped


@jit
def _velocity_error(images, settings, at, mask, GUIDED: tl.constexpr):
    """e = v - target."""
    out_ptr, v_ptr, null_ptr = images
    strength, mix_ratio, dropped, slope = settings
    v = slope * tl.load(out_ptr + at, mask=mask, other=0.0).to(tl.float32)
    target = tl.load(v_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if GUIDED:
        v_null = tl.load(null_ptr + at, mask=mask, other=0.0).to(tl.float32)
        target = guided(target, v_null, v, strength, mix_ratio, dropped)
    return v - target


@jit
def _flow_matching_sample(
    out_ptr, v_ptr, null_ptr, dropped_ptr, scales_ptr, t_ptr, direction_ptr, sample_ptr,
    n, scale, t_d, mix_ratio, slope, p, eps, GUIDED: tl.constexpr, DROPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    strength, dropped = _guidance(t_ptr, dropped_ptr, scales_ptr, b, scale, t_d, GUIDED, DROPS)
    cols = tl.arange(0, BLOCK)
    at = b * n + cols
    settings = (strength, mix_ratio, dropped, slope)
    e = _velocity_error((out_ptr, v_ptr, null_ptr), settings, at, cols < n, GUIDED)
    error = tl.sum(e * e, axis=0) / n
    weight = _power(error + eps, p) / tl.abs(slope)
    _store_sample(sample_ptr, b, tl.num_programs(0), weight * error, error, weight)
    tl.store(direction_ptr + at, 2 * slope * weight * e, mask=cols < n)


@jit
def _flow_matching_sums(
    out_ptr, v_ptr, null_ptr, dropped_ptr, scales_ptr, t_ptr, partial_ptr,
    n, chunks, rows, scale, t_d, mix_ratio, slope,
    GUIDED: tl.constexpr, DROPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One sum over a chunk: of e^2."""
    program = tl.program_id(0).to(tl.int64)
    b = program // chunks
    strength, dropped = _guidance(t_ptr, dropped_ptr, scales_ptr, b, scale, t_d, GUIDED, DROPS)
    settings = (strength, mix_ratio, dropped, slope)
    squares = tl.zeros([BLOCK], tl.float32)
    for row in range(rows):
        cols = (program % chunks * rows + row) * BLOCK + tl.arange(0, BLOCK)
        e = _velocity_error((out_ptr, v_ptr, null_ptr), settings, b * n + cols, cols < n, GUIDED)
        squares += e * e
    tl.store(partial_ptr + program, tl.sum(squares, axis=0))


@jit
def _flow_matching_direction(
    out_ptr, v_ptr, null_ptr, dropped_ptr, scales_ptr, t_ptr, direction_ptr, sample_ptr, partial_ptr,
    n, chunks, rows, scale, t_d, mix_ratio, slope, p, eps,
    GUIDED: tl.constexpr, DROPS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    b = program // chunks
    strength, dropped = _guidance(t_ptr, dropped_ptr, scales_ptr, b, scale, t_d, GUIDED, DROPS)
    settings = (strength, mix_ratio, dropped, slope)
    error = _sum_chunks(partial_ptr + b * chunks, chunks, CHUNKS) / n
    weight = _power(error + eps, p) / tl.abs(slope)
    # Every chunk's program stores the same three numbers.
    _store_sample(sample_ptr, b, tl.num_programs(0) // chunks, weight * error, error, weight)
    for row in range(rows):
        cols = (program % chunks * rows + row) * BLOCK + tl.arange(0, BLOCK)
        e = _velocity_error((out_ptr, v_ptr, null_ptr), settings, b * n + cols, cols < n, GUIDED)
        tl.store(direction_ptr + b * n + cols, 2 * slope * weight * e, mask=cols < n)


def _split(n):
    """(chunks, blocks a chunk, block, warps) of a sample of n elements; one chunk is the kernel of one launch."""
    if n <= BLOCK:
        block = power_of_two(max(n, 1))
        return 1, 1, block, max(block // 256, 1)
    block = BLOCK // 2
    blocks = -(-n // block)
    rows = -(-blocks // CHUNKS)
    return -(-blocks // rows), rows, block, 4


def _launch(kernels, sums, given, settings, weighting, **options):
    """(means of loss, error and weight; direction) by the kernels (sample, sums, direction) of a loss.

    given: the pointers of the kernels, the output first; settings: numbers of all three; weighting: p and eps.
    """
    output = given[0]
    B, n = output.shape[0], math.prod(output.shape[1:])
    direction = torch.empty(output.shape, dtype=output.dtype, device=output.device)
    samples = torch.empty(3, B, dtype=torch.float32, device=output.device)
    chunks, rows, block, warps = _split(n)
    options = {**options, "BLOCK": block, "num_warps": warps}
    sample_kernel, sums_kernel, direction_kernel = kernels
    if chunks == 1:
        launch(sample_kernel, (B,), *given, direction, samples, n, *settings, *weighting, **options)
    else:
        partials = torch.empty(B, sums, chunks, dtype=torch.float32, device=output.device)
        launch(sums_kernel, (B * chunks,), *given, partials, n, chunks, rows, *settings, **options)
        launch(
            direction_kernel, (B * chunks,), *given, direction, samples, partials, n, chunks, rows,
            *settings, *weighting, CHUNKS=power_of_two(chunks), **options,
        )  # fmt: skip
    return samples.mean(1), direction


@operation("soflow::consistency_loss")
def _consistency_loss(
    output: Tensor, value: Tensor | None, increment: Tensor, x: Tensor, target: Tensor,
    t: Tensor, l: Tensor, s: Tensor, p: float, eps: float, trig: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    given = [v.contiguous() for v in (output, output if value is None else value, increment, x, target, t, l, s)]
    kernels = (_consistency_sample, _consistency_sums, _consistency_direction)
    return _launch(kernels, 2, given, (), (float(p), float(eps)), TRIG=trig, VALUE=value is not None)


@operation("soflow::flow_matching_loss")
def _flow_matching_loss(
    output: Tensor, v_t: Tensor, t: Tensor, v_null: Tensor | None, label_dropped: Tensor | None,
    guidance_scale: float, guidance_decay_time: float, mix_ratio: float, p: float, eps: float, velocity_slope: float,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dropped = t if label_dropped is None else label_dropped.contiguous().view(torch.uint8)
    given: list[Tensor | None] = [v.contiguous() for v in (output, v_t, v_t if v_null is None else v_null, dropped, t)]
    given.insert(4, None if scales is None else scales.contiguous())
    settings = (float(guidance_scale), float(guidance_decay_time), float(mix_ratio), float(velocity_slope))
    kernels = (_flow_matching_sample, _flow_matching_sums, _flow_matching_direction)
    options = {"GUIDED": v_null is not None, "DROPS": label_dropped is not None}
    return _launch(kernels, 1, given, settings, (float(p), float(eps)), **options)


@operation("soflow::scaled_direction")
def _scaled_direction(direction: Tensor, output: Tensor, dloss: Tensor) -> Tensor:
    """The gradient of a loss with respect to `output`, from its stored direction. It has no formula of its own, so that
    a second derivative, of which the direction knows nothing, is refused."""
    return (direction.float() * (dloss / max(direction.numel(), 1))).to(direction.dtype)


@_scaled_direction.register_fake
def _(direction, output, dloss):
    return torch.empty_like(direction)


def _fake(output, *others):
    return output.new_empty(3, dtype=torch.float32), output.new_empty(output.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(output[1], inputs[0])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _grad(ctx, dmeans, _direction):
    doutput = None if dmeans is None else _scaled_direction(*ctx.saved_tensors, dmeans[0])
    return doutput, *(None,) * (len(ctx.needs_input_grad) - 1)


for _loss in (_consistency_loss, _flow_matching_loss):
    _loss.register_fake(_fake)
    _loss.register_autograd(_grad, setup_context=_save)


def consistency_loss(
    output: Tensor, increment: Tensor, x: Tensor, target: Tensor, t: Tensor, l: Tensor, s: Tensor, *,
    value: Tensor | None = None, p: float = 1.0, eps: float = 0.01, coefficients: str = "euler",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The solution-consistency loss from the network's value and increment: scalars (loss, mean q^2, mean weight).

    Args:
        output: N(x_t, t, s), [B, ...], the only argument with a gradient.
        increment: N(x_l, l, s) - N(x_t, t, s), of the shape of output.
        x: the point x_t, of the same shape.
        target: the velocity target, of the same shape.
        t, l, s: [B] in [0, 1], s <= l < t.
        value: what q takes for N(x_t, t, s), of the same shape; None: output.
        p, eps: of the weight (mean(q^2) + eps)^-p.
        coefficients: "euler" or "trig".

    float64 and empty tensors take the reference. The scalars are float32 (float64 for float64), and NaN for a batch of
    no samples. Only the loss has a gradient, once; its value means nothing, it is a surrogate.
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
    if 0 in output.shape or not use_kernel(output, increment, x, target, t, l, s, value):
        settings = {"value": value, "p": p, "eps": eps, "coefficients": coefficients}
        return consistency_loss_reference(output, increment, x, target, t, l, s, **settings)
    value = None if value is None else value.detach()
    others = (v.detach() for v in (increment, x, target, t, l, s))
    means, _ = _consistency_loss(output, value, *others, float(p), float(eps), coefficients == "trig")
    _, error, weight = means.detach().unbind()
    return means[0], error, weight


def flow_matching_loss(
    output: Tensor, v_t: Tensor, t: Tensor, v_null: Tensor | None = None, label_dropped: Tensor | None = None, *,
    guidance_scale: float | Tensor = 1.0, guidance_decay_time: float = 1.0, mix_ratio: float = 1.0,
    p: float = 1.0, eps: float = 0.01, velocity_slope: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The flow-matching loss from the network's output: scalars (loss, mean e^2, mean weight).

    Args:
        output: N(x_t, t, t), [B, ...], the only argument with a gradient.
        v_t: the path's velocity, of the shape of output.
        t: [B].
        v_null: the velocity without a label, of the shape of output; None: no guidance, the target is v_t.
        label_dropped: bool [B], where the target stays v_t; None: nowhere.
        guidance_scale, guidance_decay_time, mix_ratio: w, t_d and m of the target, as in `euler_lookahead`: w may be
            [B], one for each sample.
        p, eps: of the weight 1 / (|k| (mean(e^2) + eps)^p).
        velocity_slope: k = db/ds(t, t), not 0; the velocity is this times output.

    float64 and empty tensors take the reference. The scalars are float32 (float64 for float64), and NaN for a batch of
    no samples. Only the loss has a gradient, once.
    Raises ValueError naming the argument whose type, shape, dtype or device is wrong.
    """
    op = "flow_matching_loss"
    check_tensor(op, "output", output, (..., "elements"))
    check_tensor(op, "v_t", v_t, tuple(output.shape), output)
    check_tensor(op, "t", t, (output.shape[0],), output)
    if v_null is not None:
        check_tensor(op, "v_null", v_null, tuple(output.shape), output)
    check_mask(op, "label_dropped", label_dropped, (output.shape[0],), output)
    if velocity_slope == 0:
        raise ValueError(f"{op}: velocity_slope must not be 0")
    scale, scales = split_scale(op, guidance_scale, output)
    settings = {
        "guidance_decay_time": guidance_decay_time,
        "mix_ratio": mix_ratio,
        "p": p,
        "eps": eps,
        "velocity_slope": velocity_slope,
    }
    if 0 in output.shape or not use_kernel(output, v_t, t, v_null, scales):
        settings = {**settings, "guidance_scale": scale if scales is None else scales}
        return flow_matching_loss_reference(output, v_t, t, v_null, label_dropped, **settings)
    others = (None if v is None else v.detach() for v in (v_t, t, v_null, label_dropped))
    means, _ = _flow_matching_loss(output, *others, scale, *map(float, settings.values()), scales)
    _, error, weight = means.detach().unbind()
    return means[0], error, weight


def inspect_cases():
    """(label, call): at the shipped shapes, for `python -m soflow_kernels.inspect`."""
    for shape in ((256, 4, 32, 32), (256, 3, 64, 64)):
        for dtype in (torch.float32, torch.bfloat16):
            v, t, drop = torch.empty(shape, dtype=dtype), torch.empty(256), torch.empty(256, dtype=torch.bool)
            size, kind = "x".join(map(str, shape[1:])), str(dtype)[6:]
            for trig in (False, True):
                for name, value in (("", None), (" value", v)):
                    call = partial(_consistency_loss, v, value, v, v, v, t, t, t, 1.0, 0.01, trig)
                    yield f"consistency_loss {size} {'trig' if trig else 'euler'} {kind}{name}", call
            numbers = (3.0, 0.8, 0.25, 1.0, 0.01, 1.0)
            yield f"flow_matching_loss {size} {kind}", partial(_flow_matching_loss, v, v, t, None, None, *numbers)
            yield f"flow_matching_loss {size} {kind} guided", partial(_flow_matching_loss, v, v, t, v, drop, *numbers)
            call = partial(_flow_matching_loss, v, v, t, v, drop, *numbers, t)
            yield f"flow_matching_loss {size} {kind} guided, each by its own scale", call
