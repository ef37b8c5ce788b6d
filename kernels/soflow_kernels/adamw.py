"""AdamW, averages of the parameters and their low-precision values, over many tensors in one launch, in place.

    g = scale grad,   m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
    p = (1 - lr wd) p - lr (m / (1 - b1^k)) / (sqrt(v / (1 - b2^k)) + eps)
    ema_j = d_j ema_j + (1 - d_j) p,   w = p rounded to nearest even

k: the number of this update, of each tensor its own. p, m, v, ema: float32; grad: float32, bfloat16 or float16; w:
bfloat16 or float16, what a model in low precision multiplies with, whose float32 master is p. Where w is not p rounded,
somebody has written w since the last update, and p = w before this one. Learning rate, gradient scale, decays, k and
the flag that lets the update happen are read from device memory: nothing waits for the host, and a CUDA graph replays
the launch with other numbers.
Source: Loshchilov & Hutter, arXiv 1711.05101.

Bytes a parameter: p, m, v 8 each, grad 4 (2 in bfloat16), each average 8, w 4: 38 with bfloat16 gradients, one
average and bfloat16 weights. 675 M parameters of DiT-XL/2: 25.7 GB, 6.0 ms at 4.3 TB/s.

The launch reads a table of addresses and one of chunks. They are made on the host and copied once for each set of
tensors; gradients that are freed and made anew usually come back to the same addresses. Tensors that wide loads do not
fit (an odd address, a number of elements that is no multiple of 8) are a second launch. A CUDA graph replays the
addresses of its capture: gradients must stay where they were then, and the optimiser must live as long as the graph.
"""

import math
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from inspect import unwrap
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from soflow_kernels._dispatch import jit, launch, on_gpu, tl, use_kernel
from soflow_kernels._ops import add_op_namespace_prefix

BLOCK = 1024
KEPT_TABLES = 64
MAX_EMAS = 3
LOW_PRECISION = (torch.bfloat16, torch.float16)
GRAD_DTYPES = (torch.float32, *LOW_PRECISION)


@torch.no_grad()
def adamw_ema_reference(
    params, grads, exp_avgs, exp_avg_sqs, steps, lr, *, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01,
    grad_scale=None, emas=(), ema_decays=None, low_precision=None, finite=None,
):  # fmt: skip
    """`adamw_ema` by torch's own multi-tensor operations: any device."""
    if not params:
        return
    if not _on_host(params[0]):
        _reference_on_device(
            params, grads, exp_avgs, exp_avg_sqs, steps, lr, betas, eps, weight_decay, grad_scale, emas, ema_decays,
            low_precision, finite,
        )  # fmt: skip
        return
    if finite is not None and not bool(finite):
        return
    for p, low in zip(params, low_precision or (), strict=bool(low_precision)):
        carry_on(p, low)
    scale = 1.0 if grad_scale is None else float(grad_scale)
    as_they_are = scale == 1 and all(g.dtype == p.dtype for g, p in zip(grads, params, strict=True))
    # Scaled or widened, the gradients of all parameters at once are as much memory as the parameters, and fresh, which
    # is four times as slow as the update.
    for part in [slice(None)] if as_they_are else [slice(i, i + 1) for i in range(len(params))]:
        chosen = [g.to(p.dtype) for g, p in zip(grads[part], params[part], strict=True)]
        torch._fused_adamw_(
            params[part], chosen if scale == 1 else torch._foreach_mul(chosen, scale), exp_avgs[part],
            exp_avg_sqs[part], [], steps[part], lr=float(lr), beta1=betas[0], beta2=betas[1],
            weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False,
        )  # fmt: skip
    for average, decay in zip(emas, [] if ema_decays is None else ema_decays.tolist(), strict=True):
        torch._foreach_lerp_(average, params, 1 - decay)
    if low_precision is not None:
        torch._foreach_copy_(low_precision, params)


def _on_host(tensor):
    """Whether reading a tensor costs nothing."""
    return not on_gpu(tensor)


def carry_on(master, low, finite=None):
    """Take `master` from `low`, in place, where `low` is not `master` rounded (and `finite`, bool [], is not False)."""
    same = master.to(low.dtype).view(torch.int16) == low.view(torch.int16)
    if _on_host(master) and finite is None and bool(same.all()):
        return
    if finite is not None:
        same |= ~finite
    master.copy_(torch.where(same, master, low.to(master.dtype)))


def _reference_on_device(
    params, grads, exp_avgs, exp_avg_sqs, steps, lr, betas, eps, weight_decay, grad_scale, emas, ema_decays,
    low_precision, finite,
):  # fmt: skip
    """The same without a look at any number: a CUDA graph may record it."""
    for p, low in zip(params, low_precision or (), strict=bool(low_precision)):
        carry_on(p, low, finite)
    chosen = [g.to(p.dtype) for g, p in zip(grads, params, strict=True)]
    if grad_scale is not None:
        chosen = torch._foreach_mul(chosen, grad_scale)
    torch._fused_adamw_(
        params, chosen, exp_avgs, exp_avg_sqs, [], steps, lr=lr, beta1=betas[0], beta2=betas[1],
        weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False,
        found_inf=None if finite is None else (~finite).float(),
    )  # fmt: skip
    for average, decay in zip(emas, [] if ema_decays is None else ema_decays.unbind(), strict=True):
        change = torch._foreach_sub(params, average)
        torch._foreach_mul_(change, 1 - decay if finite is None else (1 - decay) * finite)
        torch._foreach_add_(average, change)
    if low_precision is None:
        return
    if finite is None:
        torch._foreach_copy_(low_precision, params)
        return
    for p, low in zip(params, low_precision, strict=True):
        low.copy_(torch.where(finite, p.to(low.dtype), low))


@jit
def _one_minus_power(k, log_beta):
    """1 - beta^k, by the series of 1 - e^x where the two would cancel."""
    x = k * log_beta
    near = -x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720))))))
    return tl.where(x > -0.25, near, 1 - tl.exp(x))


@jit
def _at(row_ptr, slot, like_ptr, ALIGNED: tl.constexpr):
    """The address in a slot of the table, as a pointer of the type of `like_ptr`."""
    ptr = tl.load(row_ptr + slot).to(like_ptr.dtype)
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@jit
def _load(ptr, cols, n):
    return tl.load(ptr + cols, mask=cols < n, other=0.0).to(tl.float32)


@jit
def _rounded(p, dtype: tl.constexpr):
    """The bits of p, float32, rounded to nearest even of a dtype of 16 bits, as int16. NaN stays NaN."""
    if dtype == tl.bfloat16:
        # The interpreter's casts from and to bfloat16 truncate and lose the smallest numbers; integers are exact.
        bits = p.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(p == p, nearest, (bits >> 16) | 0x40).to(tl.int16)
    return p.to(dtype).to(tl.int16, bitcast=True)


@jit
def _widened(bits, dtype: tl.constexpr):
    """The float32 number of the bits of a number of 16 bits."""
    if dtype == tl.bfloat16:
        return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return bits.to(dtype, bitcast=True).to(tl.float32)


@jit
def _kernel(
    table_ptr, chunks_ptr, f32_ptr, grad_ptr, low_ptr, lr_ptr, scale_ptr, finite_ptr, decays_ptr,
    beta2, rest1, rest2, log_beta1, log_beta2, eps, weight_decay,
    SCALED: tl.constexpr, GUARDED: tl.constexpr, EMAS: tl.constexpr, LOW: tl.constexpr, ALIGNED: tl.constexpr,
    SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row_ptr = table_ptr + tl.load(chunks_ptr + 2 * program) * SLOTS
    cols = tl.load(chunks_ptr + 2 * program + 1) * BLOCK + tl.arange(0, BLOCK)
    n = tl.load(row_ptr)
    if ALIGNED:  # or the bound would stand in the way of wide loads
        n = tl.multiple_of(n, 8)
    if GUARDED:
        n = tl.where(tl.load(finite_ptr) != 0, n, 0)
    if ALIGNED:
        n = tl.multiple_of(n, 8)
    scale = 1.0
    if SCALED:
        scale = tl.load(scale_ptr)
    lr = tl.load(lr_ptr)
    k = tl.load(tl.load(row_ptr + 1).to(f32_ptr.dtype))
    p_ptr = _at(row_ptr, 2, f32_ptr, ALIGNED)
    m_ptr = _at(row_ptr, 3, f32_ptr, ALIGNED)
    v_ptr = _at(row_ptr, 4, f32_ptr, ALIGNED)
    g = scale * _load(_at(row_ptr, 5, grad_ptr, ALIGNED), cols, n)
    m = _load(m_ptr, cols, n)
    m += rest1 * (g - m)
    v = beta2 * _load(v_ptr, cols, n) + rest2 * g * g
    p = _load(p_ptr, cols, n)
    if LOW:
        w_ptr = _at(row_ptr, 6, low_ptr, ALIGNED)
        written = tl.load(w_ptr + cols, mask=cols < n, other=0.0).to(tl.int16, bitcast=True)
        p = tl.where(written == _rounded(p, low_ptr.dtype.element_ty), p, _widened(written, low_ptr.dtype.element_ty))
    deviation = tl.sqrt(v) / tl.sqrt(_one_minus_power(k, log_beta2))
    # One rounding of p: a rounded 1 - lr wd would err to the same side in every update.
    p -= lr * weight_decay * p + lr / _one_minus_power(k, log_beta1) * m / (deviation + eps)
    tl.store(m_ptr + cols, m, mask=cols < n)
    tl.store(v_ptr + cols, v, mask=cols < n)
    tl.store(p_ptr + cols, p, mask=cols < n)
    if LOW:
        rounded = _rounded(p, low_ptr.dtype.element_ty)
        tl.store(w_ptr + cols, rounded.to(low_ptr.dtype.element_ty, bitcast=True), mask=cols < n)
    for j in tl.static_range(EMAS):
        ema_ptr = _at(row_ptr, 7 + j, f32_ptr, ALIGNED)
        ema = _load(ema_ptr, cols, n)
        rest = (1 - tl.load(decays_ptr + j)).to(tl.float32)
        tl.store(ema_ptr + cols, ema + rest * (p - ema), mask=cols < n)


class _Pinned:
    """Pinned memory for the next tables. It is allocated outside of captures, where torch 2.10 must not do so, and what
    a capture has taken stays as it is: the copy from it is made again at every replay."""

    def __init__(self):
        self.spare = None
        self.used = 0

    def reserve(self, numbers):
        """Have room for so many int64 numbers, outside of a capture."""
        if self.spare is None or len(self.spare) - self.used < numbers:
            self.spare, self.used = torch.empty(numbers, dtype=torch.int64).pin_memory(), 0

    def take(self, values):
        """A copy of an int64 tensor there, or in new memory if there is no room."""
        if self.spare is None or len(self.spare) - self.used < values.numel():
            return values.pin_memory()
        place = self.spare[self.used : self.used + values.numel()].view(values.shape)
        self.used += values.numel()
        return place.copy_(values)


class _Tables:
    """The tables that launches read, for the sets of tensors that were used last."""

    def __init__(self):
        self.found = {}  # (device, sizes, addresses): tables
        self.captured = []  # what CUDA graphs read again at every replay
        self.pinned = _Pinned()

    def of(self, lists, device):
        """[(table [tensors, slots], chunks [programs, 2], aligned)]: the tensors that wide loads fit, and the others.

        A row of a table is a tensor: its number of elements, and the addresses of its step, parameter, moments,
        gradient, low-precision weight and averages. The same tensors are looked up, not copied again; what is made in
        the capture of a CUDA graph is not, as it is filled at the first replay only.
        """
        sizes = tuple(p.numel() for p in lists[1])
        columns = tuple(tuple(tensor.data_ptr() for tensor in tensors) or (0,) * len(sizes) for tensors in lists)
        key = (device, sizes, columns)
        capturing = _is_capturing(device)
        made, sources = self.found.get(key), []
        if made is None:
            rows = [row for row in zip(sizes, *columns, strict=True) if row[0]]
            for aligned in (True, False):
                chosen = [r for r in rows if aligned == (r[0] % 8 == 0 and all(address % 16 == 0 for address in r[2:]))]
                if chosen:
                    sources.append((torch.tensor(chosen), _chunks([row[0] for row in chosen]), aligned))
            if device.type == "cuda":
                if not capturing:
                    self.pinned.reserve(sum(table.numel() + chunks.numel() for table, chunks, _ in sources))
                sources = [(*map(self.pinned.take, source[:2]), source[2]) for source in sources]
            made = [(_upload(table, device), _upload(chunks, device), aligned) for table, chunks, aligned in sources]
        if capturing:
            self.captured.append((made, sources))
        else:
            if device.type == "cuda":  # a capture may come next
                self.pinned.reserve(sum(table.numel() + chunks.numel() for table, chunks, _ in made))
            self.found.pop(key, None)
            while len(self.found) >= KEPT_TABLES:  # the one that was not used for longest goes
                del self.found[next(iter(self.found))]
            self.found[key] = made
        return made


def _upload(values, device):
    """A copy on the device, which nothing waits for where `values` are pinned."""
    return values.to(device, non_blocking=True)


def _is_capturing(device):
    """Whether a CUDA graph captures the current stream of a device."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _chunks(sizes):
    """[programs, 2]: a row's number and the block in it, for rows of these numbers of elements."""
    counts = torch.tensor([-(-n // BLOCK) for n in sizes])
    rows = torch.arange(len(sizes)).repeat_interleave(counts)
    blocks = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
    return torch.stack([rows, blocks], dim=1)


# The tables of every optimiser that lives, by the number under which its calls find them.
_owned: weakref.WeakValueDictionary[int, _Tables] = weakref.WeakValueDictionary()
# Those of calls of the functional form that a CUDA graph captured, until the memory that they point to is freed.
_captured: list[tuple[StorageWeakRef, _Tables]] = []


def _log(beta):
    return math.log(beta) if beta else -1e30


@torch.library.custom_op(
    add_op_namespace_prefix("adamw_ema"), mutates_args=("params", "exp_avgs", "exp_avg_sqs", "emas", "low_precision")
)
def _adamw_ema(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    emas: list[Tensor], low_precision: list[Tensor], steps: list[Tensor], lr: Tensor, grad_scale: Tensor | None,
    finite: Tensor | None, ema_decays: Tensor | None, beta1: float, beta2: float, eps: float, weight_decay: float,
    owner: int,
) -> None:  # fmt: skip
    n = len(params)
    averages = [emas[i : i + n] for i in range(0, len(emas), n)]
    lists = [steps, params, exp_avgs, exp_avg_sqs, grads, low_precision, *averages]
    tables = _owned.get(owner, _Tables())
    for table, chunks, aligned in tables.of(lists, params[0].device):
        launch(
            _kernel, (chunks.shape[0],),
            table, chunks, params[0], grads[0], low_precision[0] if low_precision else params[0], lr,
            lr if grad_scale is None else grad_scale, lr if finite is None else finite,
            lr if ema_decays is None else ema_decays,
            # 1 - beta of a float32 beta would be off by a millionth.
            beta2, 1 - beta1, 1 - beta2, _log(beta1), _log(beta2), eps, weight_decay,
            SCALED=grad_scale is not None, GUARDED=finite is not None, EMAS=len(averages), LOW=bool(low_precision),
            ALIGNED=aligned, SLOTS=table.shape[1], BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    if owner not in _owned and tables.captured:
        _captured[:] = [entry for entry in _captured if not entry[0].expired()]
        _captured.append((StorageWeakRef(params[0].untyped_storage()), tables))


@_adamw_ema.register_fake
def _(params, *rest):
    return None


@torch.no_grad()
def adamw_ema(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: Tensor,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    grad_scale: Tensor | None = None,
    emas: Sequence[Sequence[Tensor]] = (),
    ema_decays: Tensor | None = None,
    low_precision: Sequence[Tensor] | None = None,
    finite: Tensor | None = None,
) -> None:
    """One AdamW update of many tensors in place, their averages and low-precision weights included.

    params, exp_avgs, exp_avg_sqs: lists of float32 tensors of one device, dense, those of one parameter of the same
    strides; grads: the same shapes, float32, bfloat16 or float16; steps: float32 tensors [], the number of this
    update, from 1; lr: float32 tensor []. grad_scale: float32 tensor [] that multiplies the gradients, None: 1.
    emas: up to three lists like params, with the decays ema_decays, float64 [emas], as 1 - d of a float32 d is off by
    a millionth. low_precision: a list of bfloat16 or float16 tensors, the weights whose masters params are: each takes
    the new parameter, rounded to nearest even; an element that is not the old parameter rounded was written by somebody
    else, and is what the update starts from. finite: bool tensor []; where it is False nothing is written.
    float64 parameters take the reference.
    Raises ValueError naming the argument whose type, shape, dtype, layout or device is wrong.
    """
    if not isinstance(params, (list, tuple)):
        raise ValueError(f"adamw_ema: params must be a list of tensors, got {type(params).__name__}")
    if params:
        lists = (params, grads, exp_avgs, exp_avg_sqs, steps, lr)
        _check_update(*lists, betas, grad_scale, emas, ema_decays, low_precision, finite)
        _update(*lists, betas, eps, weight_decay, grad_scale, emas, ema_decays, low_precision, finite, owner=0)


def _update(
    params, grads, exp_avgs, exp_avg_sqs, steps, lr, betas, eps, weight_decay, grad_scale, emas, ema_decays,
    low_precision, finite, owner,
):  # fmt: skip
    """`adamw_ema` of arguments that were checked. owner: whose tables the launch reads."""
    grads = [_laid_out(g, p) for g, p in zip(grads, params, strict=True)]
    if params[0].dtype == torch.float64 or not use_kernel(params[0], grads[0]):
        adamw_ema_reference(
            params, grads, exp_avgs, exp_avg_sqs, steps, lr, betas=betas, eps=eps, weight_decay=weight_decay,
            grad_scale=grad_scale, emas=emas, ema_decays=ema_decays, low_precision=low_precision, finite=finite,
        )  # fmt: skip
        return
    _adamw_ema(
        list(params), grads, list(exp_avgs), list(exp_avg_sqs), [t for average in emas for t in average],
        list(low_precision or ()), list(steps), lr, grad_scale,
        None if finite is None else finite.view(torch.uint8), ema_decays if emas else None,
        float(betas[0]), float(betas[1]), float(eps), float(weight_decay), owner,
    )  # fmt: skip


def clip_scale(norm: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
    """(grad_scale, finite) of `adamw_ema` from a gradient norm [], float32 and bool [] on its device.

    What torch's clipping multiplies by, min(1, max_norm / (norm + 1e-6)), 1 for max_norm 0, which is no clipping; and
    whether the norm, and so every gradient, is finite. norm may be a DTensor.
    """
    if _is_dtensor(norm):
        norm = norm.full_tensor()  # pyright: ignore[reportAttributeAccessIssue]
    finite = torch.isfinite(norm)
    scale = torch.ones_like(norm) if not max_norm else (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return scale.float(), finite


# Kinds and layouts of tensors.


def _loaded(module, name):
    """The class of that name if its module was imported: nothing is an instance of it otherwise."""
    return getattr(sys.modules.get(module), name, None)


def _is_dtensor(tensor):
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    kind = _loaded("torch.distributed.tensor", "DTensor")
    return kind is not None and isinstance(tensor, kind)


def _is_plain(tensor):
    """Whether a tensor's memory is what it stands for. A fake tensor's would be."""
    kind = type(tensor)
    return kind in (Tensor, nn.Parameter) or kind is _loaded("torch._subclasses.fake_tensor", "FakeTensor")


def _local(tensor):
    """The part of a tensor that this process holds."""
    return tensor.to_local() if _is_dtensor(tensor) else tensor


def _placement(tensor):
    """The mesh and placements of a DTensor, None for another tensor."""
    return (tensor.device_mesh, tuple(tensor.placements)) if _is_dtensor(tensor) else None


def _is_low(p):
    return p.dtype in LOW_PRECISION


def _same_layout(a, b):
    """Whether the elements of two tensors of one shape lie in the same order in memory, both dense."""
    if a.stride() == b.stride() or (a.is_contiguous() and b.is_contiguous()):
        return True
    # The stride of a dimension of one element has no meaning.
    return a.numel() == 0 or all(x == y for x, y, n in zip(a.stride(), b.stride(), a.shape, strict=True) if n > 1)


def _laid_out(tensor, p):
    """The tensor itself if its elements lie in the same order as those of p, else a copy in which they do."""
    if _same_layout(_local(tensor), _local(p)):
        return tensor
    return torch.empty_like(p, dtype=tensor.dtype, memory_format=torch.preserve_format).copy_(tensor)


def _check_update(params, grads, exp_avgs, exp_avg_sqs, steps, lr, betas, grad_scale, emas, ema_decays, low, finite):
    """Raise ValueError naming the argument of `adamw_ema` that is wrong."""
    wide = isinstance(params[0], Tensor) and params[0].dtype == torch.float64
    single = (torch.float64,) if wide else (torch.float32,)
    if not isinstance(params[0], Tensor):
        raise ValueError(f"adamw_ema: params must be a list of tensors, got {type(params[0]).__name__} in it")
    for name, tensors in (("params", params), ("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs)):
        _check_list(name, tensors, params, single)
    _check_list("grads", grads, params, single if wide else GRAD_DTYPES)
    _check_list("steps", steps, params, (torch.float32,))
    if not isinstance(emas, (list, tuple)) or len(emas) > MAX_EMAS:
        number = len(emas) if isinstance(emas, (list, tuple)) else type(emas).__name__
        raise ValueError(f"adamw_ema: emas must be at most {MAX_EMAS} lists, got {number}")
    for j, average in enumerate(emas):
        _check_list(f"emas[{j}]", average, params, single)
    if low is not None:
        _check_list("low_precision", low, params, LOW_PRECISION)
    if emas and ema_decays is None:
        raise ValueError(f"adamw_ema: ema_decays must be a float64 tensor of shape [{len(emas)}], got NoneType")
    if not isinstance(betas, (list, tuple)) or len(betas) != 2 or any(not 0 <= beta < 1 for beta in betas):
        raise ValueError(f"adamw_ema: betas must be two numbers in [0, 1), got {betas!r}")
    if not isinstance(lr, Tensor):
        raise ValueError(f"adamw_ema: lr must be a float32 tensor of shape [], got {type(lr).__name__}")
    _check_numbers("lr", lr, (), params[0])
    _check_numbers("grad_scale", grad_scale, (), params[0])
    _check_numbers("ema_decays", ema_decays, (len(emas),), params[0], (torch.float64,))
    _check_numbers("finite", finite, (), params[0], (torch.bool,))


def _check_list(name, tensors, params, dtypes):
    """Raise ValueError unless these are as many tensors as parameters, of their shapes (steps: []) and one dtype."""
    if not isinstance(tensors, (list, tuple)) or len(tensors) != len(params):
        number = len(tensors) if isinstance(tensors, (list, tuple)) else type(tensors).__name__
        raise ValueError(f"adamw_ema: {name} must be a list of {len(params)} tensors, got {number}")
    for i, (tensor, p) in enumerate(zip(tensors, params, strict=True)):
        _check_tensor("adamw_ema", f"{name}[{i}]", tensor, None if name == "steps" else p, dtypes)
        if tensor.dtype != tensors[0].dtype:
            raise ValueError(f"adamw_ema: {name}[{i}] must be {tensors[0].dtype}, all alike, got {tensor.dtype}")
        if tensor.device != params[0].device:
            raise ValueError(f"adamw_ema: {name}[{i}] must be on {params[0].device}, got {tensor.device}")
        # Gradients are copied to the order of the parameters.
        if name not in ("grads", "steps") and not _same_layout(tensor, p):
            raise ValueError(f"adamw_ema: {name}[{i}] must have the strides {p.stride()}, got {tensor.stride()}")


def _check_tensor(op, name, tensor, like, dtypes):
    """Raise ValueError unless this is a tensor of the shape of `like` (None: []), of one of the dtypes, and dense."""
    shape = torch.Size([]) if like is None else like.shape
    if not isinstance(tensor, Tensor) or tensor.shape != shape:
        got = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{op}: {name} must be a tensor of shape {list(shape)}, got {got}")
    if not _is_plain(tensor) or tensor.layout != torch.strided:
        kind = type(tensor).__name__ if not _is_plain(tensor) else tensor.layout
        raise ValueError(f"{op}: {name} must be a plain tensor, got {kind}")
    if tensor.dtype not in dtypes:
        known = ", ".join(str(dtype)[6:] for dtype in dtypes)
        raise ValueError(f"{op}: {name} must be {known}, got {tensor.dtype}")
    if not name.startswith("params") or tensor.is_contiguous():
        return
    if not torch.ops.aten.is_non_overlapping_and_dense.default(tensor):
        raise ValueError(f"{op}: {name} must be dense, got strides {tensor.stride()} of {list(shape)}")


def _check_numbers(name, value, shape, like, dtypes=(torch.float32,)):
    if value is None:
        return
    if not isinstance(value, Tensor) or tuple(value.shape) != shape or value.dtype not in dtypes:
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"adamw_ema: {name} must be a {str(dtypes[0])[6:]} tensor of shape {list(shape)}, got {got}")
    if not _is_plain(value):
        raise ValueError(f"adamw_ema: {name} must be a plain tensor, got {type(value).__name__}")
    if value.device != like.device:
        raise ValueError(f"adamw_ema: {name} must be on {like.device}, got {value.device}")


class _Uncast:
    """A tensor that torch's loader does not cast to its parameter's dtype."""

    def __init__(self, value):
        self.value = value


def _uncast(optimizer, state_dict):
    """The state_dict with the states of low-precision parameters, which are float32, kept from the cast."""
    saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = dict(zip(saved, optimizer._everything(), strict=False))
    state = {}
    for index, entry in state_dict["state"].items():
        if index in params and _is_low(params[index]):
            entry = {key: v if key == "step" or not isinstance(v, Tensor) else _Uncast(v) for key, v in entry.items()}
        state[index] = entry
    return {**state_dict, "state": state}


class AdamWEMA(torch.optim.AdamW):
    """torch's AdamW whose step is `adamw_ema`: one launch for each group and dtypes of parameters and gradients.

    params: what the model multiplies with, float32, float64, bfloat16 or float16. A low-precision parameter has a
    float32 master, `state[p]["master"]`: a step updates the master and writes it, rounded to nearest even, into the
    parameter. The parameter is the truth: what somebody writes into it between two steps, its next step starts from.
    emas: up to three lists of float32 tensors, in the order of all parameters of all groups; ema_decays: as many
    numbers in [0, 1), later the tensor of that name. masters: float32 tensors in that order, taken as they are; None
    for a parameter that is its own master, and for a low-precision one whose master is to be made from it.

    Where a parameter is of low precision, the states of all that require a gradient are made at once, as a state_dict
    must hold the masters. It is torch's AdamW's otherwise, and each loads the other's; moments and masters stay
    float32. Loading writes no parameter. So a model and its optimiser resume exactly, whichever is loaded first: each
    parameter is its master rounded once both are. Where a state_dict has no masters (torch's), they are made from the
    parameters. Masters that were there stay the same tensors.

    Parameters may be dense without being contiguous (channels_last). DTensors are updated where they lie; gradients,
    averages and masters must be placed alike. A gradient scaler unscales the gradients itself and skips the step, as
    for an optimiser that is not fused. A CUDA graph that captured a step must not outlive the optimiser.
    Raises ValueError for lists that do not fit, for other subclasses of tensors, and for AdamW's own reasons.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        emas: Sequence[Sequence[Tensor]] = (),
        ema_decays: Sequence[float] = (),
        masters: Sequence[Tensor | None] | None = None,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        everything = self._everything()
        if len(emas) != len(ema_decays) or len(emas) > MAX_EMAS:
            raise ValueError(f"AdamWEMA: emas must be at most {MAX_EMAS} lists and as many decays, got {len(emas)}")
        if any(not 0 <= decay < 1 for decay in ema_decays):
            raise ValueError(f"AdamWEMA: ema_decays must be in [0, 1), got {tuple(ema_decays)}")
        for j, average in enumerate(emas):
            self._check_like(f"emas[{j}]", average)
        if masters is not None:
            self._check_like("masters", masters, may_be_none=True)
        device = everything[0].device
        self.ema_decays = torch.tensor([float(d) for d in ema_decays], dtype=torch.float64, device=device)
        self._emas = [dict(zip(everything, average, strict=True)) for average in emas]
        self._lr = torch.zeros((), dtype=torch.float32, device=device)
        # torch's fused AdamW reads the scale that a gradient scaler sets as its attribute; this step does not.
        self._step_supports_amp_scaling = False
        self._own_tables()
        for p, master in zip(everything, masters or (), strict=bool(masters)):
            if master is not None and master is not p:
                self.state[p]["master"] = master
        self._make_states()

    def _everything(self) -> list[Any]:
        return [p for group in self.param_groups for p in group["params"]]

    def _own_tables(self):
        self._tables = _Tables()
        _owned[id(self._tables)] = self._tables

    @torch.no_grad()
    def _check_like(self, name, tensors, may_be_none=False):
        """Raise ValueError unless these tensors lie beside the parameters, in the dtype of their masters."""
        everything = self._everything()
        if not isinstance(tensors, (list, tuple)) or len(tensors) != len(everything):
            number = len(tensors) if isinstance(tensors, (list, tuple)) else type(tensors).__name__
            raise ValueError(f"AdamWEMA: {name} must hold {len(everything)} tensors, got {number}")
        for i, (p, t) in enumerate(zip(everything, tensors, strict=True)):
            if may_be_none and (t is None or t is p):
                continue
            if may_be_none and not _is_low(p):
                raise ValueError(f"AdamWEMA: {name}[{i}] must be None: the parameter is {p.dtype}, its own master")
            if isinstance(t, Tensor) and t.shape != p.shape:
                raise ValueError(
                    f"AdamWEMA: {name} must have the parameters' shapes, got {list(t.shape)} for {list(p.shape)}"
                )
            if _placement(t) != _placement(p):
                raise ValueError(f"AdamWEMA: {name}[{i}] must be placed as its parameter, {_where(p)}, got {_where(t)}")
            t, p = _local(t), _local(p)
            dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
            _check_tensor("AdamWEMA", f"{name}[{i}]", t, p, (dtype,))
            if t.device != p.device:
                raise ValueError(f"AdamWEMA: {name}[{i}] must be on {p.device}, got {t.device}")
            if not _same_layout(t, p):
                raise ValueError(f"AdamWEMA: {name}[{i}] must have the strides {p.stride()}, got {t.stride()}")

    def __getstate__(self):
        """For deepcopy and pickle, to which torch gives its own three attributes only."""
        own = {name: getattr(self, name) for name in ("ema_decays", "_emas", "_lr")}
        return {**super().__getstate__(), **own, "_step_supports_amp_scaling": False}

    def __setstate__(self, state):
        """torch's, for a copy (which has no tables yet) and for a state_dict that was loaded."""
        copied = "_tables" not in self.__dict__
        before = {} if copied else dict(self.state)
        super().__setstate__(state)
        if copied:
            self._own_tables()
        else:
            self._settle_loaded(before)

    @torch.no_grad()
    def _settle_loaded(self, before):
        """Loaded states in float32, masters in the tensors that were there; without masters they are the parameters."""
        for p in self._everything():
            entry = self.state.get(p)
            if not _is_low(p):
                if entry is not None:
                    entry.pop("master", None)
                continue
            for key, value in (entry or {}).items():
                if isinstance(value, _Uncast):
                    self.state[p][key] = value.value.to(device=p.device, dtype=torch.float32)
            kept = before.get(p, {}).get("master")
            if kept is not None:
                kept.copy_(self.state[p].get("master", p))
                self.state[p]["master"] = kept
        self._make_states()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """torch's; refused where there are averages, which would lack the new parameters."""
        if getattr(self, "_emas", ()):
            raise ValueError("AdamWEMA: no group can be added: it has no averages")
        unwrap(torch.optim.AdamW.add_param_group)(self, param_group)
        for i, p in enumerate(self.param_groups[-1]["params"]):
            if not (_is_plain(p) or _is_dtensor(p)):
                raise ValueError(f"AdamWEMA: params[{i}] must be a plain tensor or a DTensor, got {type(p).__name__}")
            with torch.no_grad():
                _check_tensor("AdamWEMA", f"params[{i}]", _local(p), _local(p), (*GRAD_DTYPES, torch.float64))
        if hasattr(self, "_tables"):
            self._make_states()

    # torch wraps these for its compiler to leave them alone, and the wrapper imports the compiler, which takes seconds.
    state_dict = unwrap(torch.optim.AdamW.state_dict)
    zero_grad = unwrap(torch.optim.AdamW.zero_grad)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's; see the class for what becomes of the masters."""
        handle = self.register_load_state_dict_pre_hook(_uncast)  # the last one, after the user's
        try:
            unwrap(torch.optim.AdamW.load_state_dict)(self, state_dict)
        finally:
            handle.remove()

    @property
    @torch.no_grad()
    def masters(self) -> list[Tensor]:
        """The float32 weight behind every parameter, in order; the parameter itself where it has no other.

        What was written into a low-precision parameter since the last step is taken into its master first. After
        load_state_dict, load the model too before this is read: a loaded master is lost where its parameter differs.
        """
        found = []
        for p in self._everything():
            found.append(self._state(p)["master"] if _is_low(p) else p)
            if _is_low(p):
                carry_on(_local(found[-1]), _local(p))
        return found

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_scale: Tensor | None = None,
        finite: Tensor | None = None,
    ) -> Any:
        """One update, see `adamw_ema` and `clip_scale`. Parameters without a gradient stay, as do their averages."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["amsgrad"] or group["maximize"]:
                raise ValueError("AdamWEMA: amsgrad and maximize are not supported")
            kinds = {}
            for p in group["params"]:
                if p.grad is not None:
                    kinds.setdefault((p.grad.dtype, p.dtype), []).append(p)
            for chosen in kinds.values():
                self._step(group, chosen, grad_scale, finite)
        return loss

    def _step(self, group, params, grad_scale, finite):
        for p in params:
            if _placement(p.grad) != _placement(p):
                raise ValueError(f"AdamWEMA: a gradient must be placed as its parameter, {_where(p)}: {_where(p.grad)}")
        states = [self._state(p) for p in params]
        lr = group["lr"]
        if isinstance(lr, Tensor):
            lr = lr.reshape(()).to(self._lr, non_blocking=True)
        else:
            lr = self._lr.fill_(lr)
        low = _is_low(params[0])
        weights = [_local(s["master"] if low else p) for s, p in zip(states, params, strict=True)]
        grads = [_local(p.grad) for p in params]
        moments = [[_local(s[key]) for s in states] for key in ("exp_avg", "exp_avg_sq")]
        steps = [s["step"] for s in states]
        emas = [[_local(average[p]) for p in params] for average in self._emas]
        lists = (weights, grads, *moments, steps, lr)
        low_precision = [_local(p) for p in params] if low else None
        rest = (grad_scale, emas, self.ema_decays, low_precision, finite)
        _check_update(*lists, group["betas"], *rest)  # before the steps are counted
        torch._foreach_add_(steps, 1 if finite is None else [finite.float()] * len(steps))
        _update(*lists, group["betas"], group["eps"], group["weight_decay"], *rest, owner=id(self._tables))

    @torch.no_grad()
    def _make_states(self):
        everything = self._everything()
        for p in everything if any(map(_is_low, everything)) else ():
            if p.requires_grad or "master" in self.state.get(p, ()):
                self._state(p)

    def _state(self, p):
        """The whole state of a parameter, its elements in the parameter's order."""
        state = self.state[p]
        if _is_low(p) and "master" not in state:
            state["master"] = p.detach().float()
        if "step" not in state:
            weight = state.get("master", p)
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        elif state["step"].device != p.device:  # as torch keeps it unless its own fused kernel runs
            state["step"] = state["step"].to(p.device)
        for key in ("exp_avg", "exp_avg_sq", "master"):
            if key in state:
                state[key] = _laid_out(state[key], p)
        return state


def _where(tensor):
    """The placement of a tensor in words."""
    return f"a DTensor by {tensor.placements}" if _is_dtensor(tensor) else f"a {type(tensor).__name__}"


def inspect_cases():
    """(label, call): with and without averages, low precision and scale, for `python -m soflow_kernels.inspect`."""
    for grad in (torch.float32, torch.bfloat16):
        for averages, low in ((0, False), (1, False), (1, True), (3, True)):
            p, g = torch.empty(4608, 1152), torch.empty(4608, 1152, dtype=grad)
            weight = torch.empty(p.shape, dtype=torch.bfloat16)
            one, decays = torch.empty(()), torch.empty(averages, dtype=torch.float64) if averages else None
            call = partial(
                _adamw_ema, [p], [g], [p], [p], [p] * averages, [weight] * low, [one], one, one,
                torch.empty((), dtype=torch.uint8), decays, 0.9, 0.99, 1e-8, 0.0, 0,
            )  # fmt: skip
            size = f"{averages} averages{', bfloat16 weights' * low}, {str(grad)[6:]} gradients"
            yield f"adamw_ema {size}", call
