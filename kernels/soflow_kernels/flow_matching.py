"""The flow-matching loss of SoFlow (arXiv 2512.15657): guided target, weight, loss and gradient in one launch.

For each sample, with v = k N the network's velocity (k = db/ds(t, t): 1 for Euler coefficients, pi/2 for trig):

    v_g = v_t + c(t) (w - 1) (v_t - v_null),   target = m v_g + (1 - m) sg(v)   (v_t where the label was dropped)
    delta = v - target,   omega = 1 / (|k| (mean(delta^2) + eps)^p)   without gradient
    loss = mean_i omega_i mean(delta_i^2),   gradient of N: 2 k omega delta / (elements B)

output, v_t, v_null: [B, ...], bfloat16, float16 or float32, float32 inside; t: [B].

Bytes, with S = one pass over [B, ...]: forward 3 S read (without guidance 2 S), 1 S written, one launch of one program
a sample, and a mean over B. Samples above 4096 elements take two launches of several programs a sample, which read them
twice. Backward 2 S: the stored direction is scaled. At 256 x 4 x 32 x 32 in float32 S is 4.2 MB: 4 microseconds at
4.3 TB/s.
"""

import math
from functools import partial

import torch
from torch import Tensor

from soflow_kernels._dispatch import check_tensor, jit, launch, tl, use_kernel
from soflow_kernels._rows import power_of_two
from soflow_kernels.consistency import per_sample_mean, power, scaled_direction, split, sum_chunks, weight_of
from soflow_kernels.lookahead import check_mask, decay, guided, guided_target


def flow_matching_loss_reference(
    output, v_t, t, v_null=None, label_dropped=None, *,
    guidance_scale=1.0, guidance_decay_time=1.0, mix_ratio=1.0, p=1.0, eps=0.01, velocity_slope=1.0,
):  # fmt: skip
    """`flow_matching_loss` in plain PyTorch: any device and dtype."""
    wide = torch.float64 if output.dtype == torch.float64 else torch.float32
    v, v_t, t = velocity_slope * output.to(wide), v_t.detach().to(wide), t.detach()
    v_null, v_label = (None, None) if v_null is None else (v_null.to(wide), v)
    target = guided_target(v_t, v_null, v_label, t, label_dropped, guidance_scale, guidance_decay_time, mix_ratio)
    error = per_sample_mean((v - target).square())
    weight = weight_of(error, eps, p) / abs(velocity_slope)
    return (weight * error).mean(), error.detach().mean(), weight.mean()


@jit
def _guidance(t_ptr, dropped_ptr, b, scale, t_d, GUIDED: tl.constexpr, DROPS: tl.constexpr):
    """c(t) (w - 1), and whether the label was dropped, of a sample."""
    strength = 0.0
    dropped = 0
    if GUIDED:
        strength = decay(tl.load(t_ptr + b).to(tl.float32), t_d) * (scale - 1)
        if DROPS:
            dropped = tl.load(dropped_ptr + b).to(tl.int32)
    return strength, dropped


@jit
def _delta(out_ptr, v_ptr, null_ptr, at, mask, strength, mix_ratio, dropped, slope, GUIDED: tl.constexpr):
    v = slope * tl.load(out_ptr + at, mask=mask, other=0.0).to(tl.float32)
    target = tl.load(v_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if GUIDED:
        v_null = tl.load(null_ptr + at, mask=mask, other=0.0).to(tl.float32)
        target = guided(target, v_null, v, strength, mix_ratio, dropped)
    return v - target


@jit
def _write_sample(sample_ptr, b, B, error, p, eps, slope):
    """Store loss, mean delta^2 and weight of a sample; returns what delta is multiplied by in the gradient."""
    weight = power(error + eps, p) / tl.abs(slope)
    tl.store(sample_ptr + b, weight * error)
    tl.store(sample_ptr + B + b, error)
    tl.store(sample_ptr + 2 * B + b, weight)
    return 2 * slope * weight


@jit
def _sample_kernel(
    out_ptr, v_ptr, null_ptr, dropped_ptr, t_ptr, direction_ptr, sample_ptr,
    n, B, scale, t_d, mix_ratio, slope, p, eps, GUIDED: tl.constexpr, DROPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one sample, in registers."""
    b = tl.program_id(0).to(tl.int64)
    strength, dropped = _guidance(t_ptr, dropped_ptr, b, scale, t_d, GUIDED, DROPS)
    cols = tl.arange(0, BLOCK)
    at = b * n + cols
    delta = _delta(out_ptr, v_ptr, null_ptr, at, cols < n, strength, mix_ratio, dropped, slope, GUIDED)
    by = _write_sample(sample_ptr, b, B, tl.sum(delta * delta, axis=0) / n, p, eps, slope)
    tl.store(direction_ptr + at, by * delta, mask=cols < n)


@jit
def _sums_kernel(
    out_ptr, v_ptr, null_ptr, dropped_ptr, t_ptr, partial_ptr, n, chunks, rows, scale, t_d, mix_ratio, slope,
    GUIDED: tl.constexpr, DROPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the sum of delta^2 over a chunk of `rows` blocks of a sample."""
    program = tl.program_id(0).to(tl.int64)
    b = program // chunks
    strength, dropped = _guidance(t_ptr, dropped_ptr, b, scale, t_d, GUIDED, DROPS)
    squares = tl.zeros([BLOCK], tl.float32)
    for row in range(rows):
        cols = (program % chunks * rows + row) * BLOCK + tl.arange(0, BLOCK)
        delta = _delta(
            out_ptr, v_ptr, null_ptr, b * n + cols, cols < n, strength, mix_ratio, dropped, slope, GUIDED
        )  # fmt: skip
        squares += delta * delta
    tl.store(partial_ptr + program, tl.sum(squares, axis=0))


@jit
def _direction_kernel(
    out_ptr, v_ptr, null_ptr, dropped_ptr, t_ptr, direction_ptr, sample_ptr, partial_ptr,
    n, B, chunks, rows, scale, t_d, mix_ratio, slope, p, eps,
    GUIDED: tl.constexpr, DROPS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the direction of a chunk, from the sums of all chunks of its sample."""
    program = tl.program_id(0).to(tl.int64)
    b = program // chunks
    strength, dropped = _guidance(t_ptr, dropped_ptr, b, scale, t_d, GUIDED, DROPS)
    error = sum_chunks(partial_ptr + b * chunks, chunks, CHUNKS) / n
    # Every chunk's program stores the same three numbers.
    by = _write_sample(sample_ptr, b, B, error, p, eps, slope)
    for row in range(rows):
        cols = (program % chunks * rows + row) * BLOCK + tl.arange(0, BLOCK)
        delta = _delta(
            out_ptr, v_ptr, null_ptr, b * n + cols, cols < n, strength, mix_ratio, dropped, slope, GUIDED
        )  # fmt: skip
        tl.store(direction_ptr + b * n + cols, by * delta, mask=cols < n)


@torch.library.custom_op("soflow::flow_matching_loss", mutates_args=())
def _flow_matching_loss(
    output: Tensor, v_t: Tensor, t: Tensor, v_null: Tensor | None, label_dropped: Tensor | None,
    guidance_scale: float, guidance_decay_time: float, mix_ratio: float, p: float, eps: float, velocity_slope: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, n = output.shape[0], math.prod(output.shape[1:])
    output, v_t = output.contiguous(), v_t.contiguous()
    direction = torch.empty(output.shape, dtype=output.dtype, device=output.device)
    samples = torch.empty(3, B, dtype=torch.float32, device=output.device)
    null = v_t if v_null is None else v_null.contiguous()
    dropped = t if label_dropped is None else label_dropped.contiguous().view(torch.uint8)
    given = (output, v_t, null, dropped, t.contiguous())
    guidance = (float(guidance_scale), float(guidance_decay_time), float(mix_ratio), float(velocity_slope))
    chunks, rows, block, warps = split(n)
    options = {"GUIDED": v_null is not None, "DROPS": label_dropped is not None, "BLOCK": block, "num_warps": warps}
    if chunks == 1:
        launch(_sample_kernel, (B,), *given, direction, samples, n, B, *guidance, float(p), float(eps), **options)
    else:
        partials = torch.empty(B, chunks, dtype=torch.float32, device=output.device)
        launch(_sums_kernel, (B * chunks,), *given, partials, n, chunks, rows, *guidance, **options)
        launch(
            _direction_kernel, (B * chunks,), *given, direction, samples, partials, n, B, chunks, rows, *guidance,
            float(p), float(eps), CHUNKS=power_of_two(chunks), **options,
        )  # fmt: skip
    return samples.mean(1), direction


@_flow_matching_loss.register_fake
def _(output, *rest):
    return output.new_empty(3, dtype=torch.float32), output.new_empty(output.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(output[1], inputs[0])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _grad(ctx, dmeans, _direction):
    if dmeans is None:
        return (None,) * 11
    return scaled_direction(*ctx.saved_tensors, dmeans[0]), *(None,) * 10


_flow_matching_loss.register_autograd(_grad, setup_context=_save)


def flow_matching_loss(
    output, v_t, t, v_null=None, label_dropped=None, *,
    guidance_scale=1.0, guidance_decay_time=1.0, mix_ratio=1.0, p=1.0, eps=0.01, velocity_slope=1.0,
):  # fmt: skip
    """The flow-matching loss from the network's output; returns scalars (loss, mean delta^2, mean weight).

    output: N(x_t, t, t), [B, ...], the only argument with a gradient. Of its shape: v_t, the path's velocity; v_null,
    the velocity without a label, None: no guidance, the target is v_t. t: [B]; label_dropped: bool [B], where the
    target stays v_t, None: nowhere. velocity_slope: db/ds(t, t), not 0; the velocity is this times output.
    float64 takes the reference. The scalars are float32 (float64 for float64) and only the loss has a gradient, once.
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
    settings = {
        "guidance_scale": guidance_scale,
        "guidance_decay_time": guidance_decay_time,
        "mix_ratio": mix_ratio,
        "p": p,
        "eps": eps,
        "velocity_slope": velocity_slope,
    }
    if not use_kernel(output, v_t, t, v_null):
        return flow_matching_loss_reference(output, v_t, t, v_null, label_dropped, **settings)
    others = (None if v is None else v.detach() for v in (v_t, t, v_null, label_dropped))
    means, _ = _flow_matching_loss(output, *others, *map(float, settings.values()))
    _, error, weight = means.detach().unbind()
    return means[0], error, weight


def inspect_cases():
    """(label, call): at the shipped shapes, for `python -m soflow_kernels.inspect`."""
    for shape in ((2, 4, 32, 32), (2, 3, 64, 64)):
        for dtype in (torch.float32, torch.bfloat16):
            v, t, drop = torch.zeros(shape, dtype=dtype), torch.zeros(2), torch.zeros(2, dtype=torch.bool)
            size = f"{'x'.join(map(str, shape[1:]))} {str(dtype)[6:]}"
            numbers = (3.0, 0.8, 0.25, 1.0, 0.01, 1.0)
            yield f"flow_matching_loss {size}", partial(_flow_matching_loss, v, v, t, None, None, *numbers)
            yield f"flow_matching_loss {size} guided", partial(_flow_matching_loss, v, v, t, v, drop, *numbers)
