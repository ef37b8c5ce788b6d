"""Sinusoids of t and of t - s, and their increments for t -> t + dt (see the package), with u = t w_i, du = dt w_i:

    cos(u + du) - cos(u) = -2 sin(u + du/2) sin(du/2),   sin(u + du) - sin(u) = 2 cos(u + du/2) sin(du/2)

t, dt, s: [B]; result [2, 2, B, F]: value and increment, of t and of t - s, [cos, sin]. One launch. The frequencies are
those of `soflow_kernels.time_embedding`.
"""

import math
from functools import partial

import torch
from torch import Tensor

from soflow_kernels._dispatch import check_dtype, check_plain, check_quiet, jit, launch, operation, tl, use_kernel
from soflow_kernels._math import sincos
from soflow_kernels.increment._pair import wide
from soflow_kernels.time_embedding import MAX_PERIOD, frequency, split_step

COLUMNS = 128


def time_embedding_increment_reference(
    t: Tensor, dt: Tensor, s: Tensor, frequencies: int = 256, max_period: float = 10_000.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """`time_embedding_increment` in plain PyTorch: any device and dtype."""
    half = frequencies // 2
    t, dt, s = wide(t), wide(dt), wide(s)
    w = torch.exp(-math.log(max_period) * (torch.arange(half, device=t.device, dtype=t.dtype) / half))
    angle = torch.stack([t, t - s])[..., None] * w
    step = dt[:, None] * w / 2
    middle, chord = angle + step, 2 * step.sin()
    value = torch.cat([angle.cos(), angle.sin()], -1)
    return torch.stack([value, torch.cat([-middle.sin() * chord, middle.cos() * chord], -1)]).to(dtype)


@jit
def _time_kernel(
    t_ptr, dt_ptr, s_ptr, out_ptr, step, step_rest, B, blocks, HALF: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: COLUMNS of the HALF frequencies i of sample b, for both times k; step + step_rest: of w_i."""
    program = tl.program_id(0).to(tl.int64)
    b = program // blocks
    i = (program % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    mask = i < HALF
    w = frequency(i.to(tl.float32), step, step_rest)
    t = tl.load(t_ptr + b).to(tl.float32)
    s = tl.load(s_ptr + b).to(tl.float32)
    half_step = tl.load(dt_ptr + b).to(tl.float32) * w * 0.5
    chord, _ = sincos(half_step)
    for k in tl.static_range(2):
        angle = (t - k * s) * w
        sin, cos = sincos(angle)
        middle_sin, middle_cos = sincos(angle + half_step)
        row = out_ptr + (k * B + b) * (2 * HALF)
        tl.store(row + i, cos, mask=mask)
        tl.store(row + HALF + i, sin, mask=mask)
        row += 2 * B * (2 * HALF)
        tl.store(row + i, -2 * chord * middle_sin, mask=mask)
        tl.store(row + HALF + i, 2 * chord * middle_cos, mask=mask)


@operation("soflow::time_embedding_increment")
def _time(t: Tensor, dt: Tensor, s: Tensor, frequencies: int, max_period: float, dtype: torch.dtype) -> Tensor:
    B, half = t.shape[0], frequencies // 2
    out = torch.empty(2, 2, B, frequencies, dtype=dtype, device=t.device)
    blocks = -(-half // COLUMNS)
    launch(
        _time_kernel, (B * blocks,),
        t.contiguous(), dt.contiguous(), s.contiguous(), out, *split_step(max_period, half), B, blocks,
        HALF=half, COLUMNS=COLUMNS, num_warps=1,
    )  # fmt: skip
    return out


@_time.register_fake
def _(t, dt, s, frequencies, max_period, dtype):
    return t.new_empty(2, 2, t.shape[0], frequencies, dtype=dtype)


def time_embedding_increment(
    t: Tensor, dt: Tensor, s: Tensor, *, frequencies: int = 256, max_period: float = 10_000.0,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Sinusoids [cos, sin] of t and of t - s, and their increments for t -> t + dt: [2, 2, B, F], the pair first.

    t, dt, s: [B], not scaled; frequencies: F, even; dtype: of the result, None: that of t. float64 takes the reference;
    no gradient.
    Raises ValueError naming the argument that is wrong or requires a gradient.
    """
    op = "time_embedding_increment"
    check_quiet(op, "t", t, ("B",))
    check_plain(op, "t", t)
    for name, value in (("dt", dt), ("s", s)):
        check_quiet(op, name, value, tuple(t.shape), t)
        check_plain(op, name, value)
    check_dtype(op, "dtype", dtype)
    if isinstance(max_period, bool) or not isinstance(max_period, (int, float)) or not 1 <= max_period <= MAX_PERIOD:
        raise ValueError(f"{op}: max_period must be a number in [1, 1e30], got {max_period!r}")
    if not isinstance(frequencies, int) or frequencies < 2 or frequencies % 2:
        raise ValueError(f"{op}: frequencies must be an even number above 0, got {frequencies!r}")
    if not use_kernel(t, dt, s):
        return time_embedding_increment_reference(t, dt, s, frequencies, max_period, dtype or t.dtype)
    return _time(t, dt, s, frequencies, float(max_period), dtype or t.dtype)


def inspect_cases():
    """(label, call): at the shipped shape, for `python -m soflow_kernels.inspect`."""
    t = torch.zeros(64)
    yield "time_embedding_increment 256", partial(_time, t, t, t, 256, 1e4, torch.float32)
