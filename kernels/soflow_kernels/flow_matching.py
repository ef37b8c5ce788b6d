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
from soflow_kernels.consistency import phases
from soflow_kernels.lookahead import check_mask, decay, guided, guided_target


def flow_matching_loss_reference(
    output, v_t, t, v_null=None, label_dropped=None, *,
    guidance_scale=1.0, guidance_decay_time=1.0, mix_ratio=1.0, p=1.0, eps=0.01, velocity_slope=1.0,
):  # fmt: skip
    """`flow_matching_loss` in plain PyTorch: any device and dtype."""
    wide = torch.float64 if output.dtype == torch.float64 else torch.float32
    v, v_t = velocity_slope * output.to(wide), v_t.detach().to(wide)
    v_null, v_label = (None, None) if v_null is None else (v_null.to(wide), v)
    target = guided_target(v_t, v_null, v_label, t, label_dropped, guidance_scale, guidance_decay_time, mix_ratio)
    error = (v - target).square().flatten(1).mean(1)
    weight = 1 / (abs(velocity_slope) * (error.detach() + eps) ** p)
    return (weight * error).mean(), error.detach().mean(), weight.mean()


@jit
def _delta(
    out_ptr, v_ptr, null_ptr, at, mask, strength, mix_ratio, dropped, slope, GUIDED: tl.constexpr,
):  # fmt: skip
    v = slope * tl.load(out_ptr + at, mask=mask, other=0.0).to(tl.float32)
    target = tl.load(v_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if GUIDED:
        v_null = tl.load(null_ptr + at, mask=mask, other=0.0).to(tl.float32)
        target = guided(target, v_null, v, strength, mix_ratio, dropped, True)
    return v - target


@jit
def _kernel(
    out_ptr, v_ptr, null_ptr, dropped_ptr, t_ptr, direction_ptr, sample_ptr, partial_ptr,
    n, B, chunks, rows, scale, t_d, mix_ratio, p, eps, slope,
    GUIDED: tl.constexpr, DROPS: tl.constexpr, PHASE: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The phases are those of the consistency loss: 0 is a whole sample, 1 the sums of a chunk, 2 its direction."""
    program = tl.program_id(0).to(tl.int64)
    b = program // chunks
    chunk = program % chunks
    strength = 0.0
    dropped = 0
    if GUIDED:
        strength = decay(tl.load(t_ptr + b).to(tl.float32), t_d) * (scale - 1)
        if DROPS:
            dropped = tl.load(dropped_ptr + b).to(tl.int32)
    cols = tl.arange(0, BLOCK)
    base = b * n
    if PHASE == 0:
        delta = _delta(
            out_ptr, v_ptr, null_ptr, base + cols, cols < n, strength, mix_ratio, dropped, slope, GUIDED
        )  # fmt: skip
        error = tl.sum(delta * delta, axis=0) / n
    if PHASE == 1:
        squares = tl.zeros([BLOCK], tl.float32)
        for row in range(rows):
            at = (chunk * rows + row) * BLOCK + cols
            delta = _delta(
                out_ptr, v_ptr, null_ptr, base + at, at < n, strength, mix_ratio, dropped, slope, GUIDED
            )  # fmt: skip
            squares += delta * delta
        tl.store(partial_ptr + program, tl.sum(squares, axis=0))
    if PHASE == 2:
        each = tl.arange(0, CHUNKS)
        error = tl.sum(tl.load(partial_ptr + b * chunks + each, mask=each < chunks, other=0.0), axis=0) / n
    if PHASE != 1:
        weight = tl.exp(-p * tl.log(error + eps)) / tl.abs(slope)
        if chunk == 0:
            tl.store(sample_ptr + b, weight * error)
            tl.store(sample_ptr + B + b, error)
            tl.store(sample_ptr + 2 * B + b, weight)
        if PHASE == 0:
            tl.store(direction_ptr + base + cols, 2 * slope * weight * delta, mask=cols < n)
        else:
            for row in range(rows):
                at = (chunk * rows + row) * BLOCK + cols
                delta = _delta(
                    out_ptr, v_ptr, null_ptr, base + at, at < n, strength, mix_ratio, dropped, slope, GUIDED
                )  # fmt: skip
                tl.store(direction_ptr + base + at, 2 * slope * weight * delta, mask=at < n)


@torch.library.custom_op("soflow::flow_matching_loss", mutates_args=())
def _flow_matching_loss(
    output: Tensor, v_t: Tensor, t: Tensor, v_null: Tensor | None, label_dropped: Tensor | None,
    guidance_scale: float, guidance_decay_time: float, mix_ratio: float, p: float, eps: float, velocity_slope: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, n = output.shape[0], math.prod(output.shape[1:])
    output, v_t = output.contiguous(), v_t.contiguous()
    direction = torch.empty(output.shape, dtype=output.dtype, device=output.device)
    samples = torch.empty(3, B, dtype=torch.float32, device=output.device)
    steps, (chunks, rows), options = phases(B, n)
    partials = torch.empty(B, chunks, dtype=torch.float32, device=output.device)
    for phase, grid in steps:
        launch(
            _kernel, grid, output, v_t, v_t if v_null is None else v_null.contiguous(),
            t if label_dropped is None else label_dropped.contiguous().view(torch.uint8), t.contiguous(), direction,
            samples, partials, n, B, chunks, rows, float(guidance_scale), float(guidance_decay_time), float(mix_ratio),
            float(p), float(eps), float(velocity_slope),
            GUIDED=v_null is not None, DROPS=label_dropped is not None, PHASE=phase, **options,
        )  # fmt: skip
    return samples.mean(1), direction


@_flow_matching_loss.register_fake
def _(output, *rest):
    return output.new_empty(3, dtype=torch.float32), output.new_empty(output.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _grad(ctx, dmeans, _direction):
    if dmeans is None:
        return (None,) * 11
    (direction,) = ctx.saved_tensors
    grad = (direction.float() * (dmeans[0] / max(direction.numel(), 1))).to(direction.dtype)
    return grad, *(None,) * 10


_flow_matching_loss.register_autograd(_grad, setup_context=_save)


def flow_matching_loss(
    output, v_t, t, v_null=None, label_dropped=None, *,
    guidance_scale=1.0, guidance_decay_time=1.0, mix_ratio=1.0, p=1.0, eps=0.01, velocity_slope=1.0,
):  # fmt: skip
    """The flow-matching loss from the network's output; returns scalars (loss, mean delta^2, mean weight).

    output: N(x_t, t, t), [B, ...], the only argument with a gradient. Of its shape: v_t, the path's velocity; v_null,
    the velocity without a label, None: no guidance, the target is v_t. t: [B]; label_dropped: bool [B], where the
    target stays v_t, None: nowhere. velocity_slope: db/ds(t, t), not 0; the velocity is this times output.
    float64 takes the reference. The scalars are float32 (float64 for float64) and only the loss has a gradient.
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
