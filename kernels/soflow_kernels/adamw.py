"""AdamW, averages of the parameters and a copy of them in low precision, over many tensors in one launch, in place.

    g = scale grad,   m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
    p = (1 - lr wd) p - lr (m / (1 - b1^k)) / (sqrt(v / (1 - b2^k)) + eps)
    ema_j = d_j ema_j + (1 - d_j) p,   copy = p

k: the number of this update, of each tensor its own. p, m, v, ema: float32; grad: float32, bfloat16 or float16; copy:
bfloat16 or float16. Learning rate, gradient scale, decays, k and the flag that lets the update happen are read from
device memory: nothing waits for the host, and a CUDA graph replays the launch with other numbers.
Source: Loshchilov & Hutter, arXiv 1711.05101.

Bytes a parameter: p, m, v 8 each, grad 4 (2 in bfloat16), each average 8, copy 2: 36 with bfloat16 gradients, one
average and a copy. 675 M parameters of DiT-XL/2: 24.3 GB, 5.7 ms at 4.3 TB/s.

The launch reads a table of addresses and one of chunks. They are made on the host and copied once for each set of
tensors; gradients that are freed and made anew usually come back to the same addresses. Tensors that wide loads do not
fit (an odd address, a number of elements that is no multiple of 8) are a second launch. A CUDA graph replays the
addresses of its capture: gradients must stay where they were then.
"""

import math
from functools import partial
from inspect import unwrap

import torch
from torch import Tensor

from soflow_kernels._adamw_checks import MAX_EMAS, check_update
from soflow_kernels._dispatch import jit, launch, on_gpu, tl, use_kernel

BLOCK = 1024
KEPT_TABLES = 64

_tables: dict[tuple, list[tuple[Tensor, Tensor, bool]]] = {}
_chunks: dict[tuple, Tensor] = {}
_captured: list = []  # what CUDA graphs read again at every replay


def adamw_ema_reference(
    params, grads, exp_avgs, exp_avg_sqs, steps, lr, *, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01,
    grad_scale=None, emas=(), ema_decays=None, copies=None, finite=None,
):  # fmt: skip
    """`adamw_ema` by torch's own multi-tensor operations: any device."""
    if not params:
        return
    if not _on_host(params[0]):
        _reference_on_device(
            params, grads, exp_avgs, exp_avg_sqs, steps, lr, betas, eps, weight_decay, grad_scale, emas, ema_decays,
            copies, finite,
        )  # fmt: skip
        return
    if finite is not None and not bool(finite):
        return
    scale = 1.0 if grad_scale is None else float(grad_scale)
    # The scaled gradients of all parameters at once are fresh memory, four times as slow as the update.
    for part in [slice(None)] if scale == 1 else [slice(i, i + 1) for i in range(len(params))]:
        chosen = [g.to(p.dtype) for g, p in zip(grads[part], params[part], strict=True)]
        torch._fused_adamw_(
            params[part], chosen if scale == 1 else torch._foreach_mul(chosen, scale), exp_avgs[part],
            exp_avg_sqs[part], [], steps[part], lr=float(lr), beta1=betas[0], beta2=betas[1],
            weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False,
        )  # fmt: skip
    for average, decay in zip(emas, [] if ema_decays is None else ema_decays.tolist(), strict=True):
        torch._foreach_lerp_(average, params, 1 - decay)
    if copies is not None:
        torch._foreach_copy_(copies, params)


def _on_host(tensor):
    """Whether reading a tensor costs nothing."""
    return not on_gpu(tensor)


def _reference_on_device(
    params, grads, exp_avgs, exp_avg_sqs, steps, lr, betas, eps, weight_decay, grad_scale, emas, ema_decays, copies,
    finite,
):  # fmt: skip
    """The same without a look at any number: a CUDA graph may record it."""
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
    if copies is not None:
        torch._foreach_copy_(copies, params)


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
def _kernel(
    table_ptr, chunks_ptr, f32_ptr, grad_ptr, copy_ptr, lr_ptr, scale_ptr, finite_ptr, decays_ptr,
    beta2, rest1, rest2, log_beta1, log_beta2, eps, weight_decay,
    SCALED: tl.constexpr, GUARDED: tl.constexpr, EMAS: tl.constexpr, COPY: tl.constexpr, ALIGNED: tl.constexpr,
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
    deviation = tl.sqrt(v) / tl.sqrt(_one_minus_power(k, log_beta2))
    # One rounding of p: a rounded 1 - lr wd would err to the same side in every update.
    p -= lr * weight_decay * p + lr / _one_minus_power(k, log_beta1) * m / (deviation + eps)
    tl.store(m_ptr + cols, m, mask=cols < n)
    tl.store(v_ptr + cols, v, mask=cols < n)
    tl.store(p_ptr + cols, p, mask=cols < n)
    if COPY:
        tl.store(_at(row_ptr, 6, copy_ptr, ALIGNED) + cols, p, mask=cols < n)
    for j in tl.static_range(EMAS):
        ema_ptr = _at(row_ptr, 7 + j, f32_ptr, ALIGNED)
        ema = _load(ema_ptr, cols, n)
        rest = (1 - tl.load(decays_ptr + j)).to(tl.float32)
        tl.store(ema_ptr + cols, ema + rest * (p - ema), mask=cols < n)


def _to_device(values, device, captured):
    """A copy on the device, from pinned memory, which nothing waits for."""
    if device.type == "cuda":
        values = values.pin_memory()
        captured.append(values)
        values = values.to(device, non_blocking=True)
    captured.append(values)
    return values


def _chunks_of(sizes, device, captured):
    """[programs, 2]: a row's number and the block in it, for rows of these numbers of elements."""
    key = (device, sizes)
    made = _chunks.get(key)
    if made is None:
        counts = torch.tensor([-(-n // BLOCK) for n in sizes])
        rows = torch.arange(len(sizes)).repeat_interleave(counts)
        blocks = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
        made = _to_device(torch.stack([rows, blocks], dim=1), device, captured)
    return made


def _keep(cache, key, value):
    """As the last used entry; the one that was not used for longest goes."""
    cache.pop(key, None)
    while len(cache) >= KEPT_TABLES:
        del cache[next(iter(cache))]
    cache[key] = value


def _tables_of(lists, device):
    """[(table [tensors, slots], chunks [programs, 2], aligned)]: the tensors that wide loads fit, and the others.

    A row of a table is a tensor: its number of elements, and the addresses of its step, parameter, moments, gradient,
    copy and averages. The same tensors are looked up, not copied again; what a CUDA graph captures lives on, and what
    is made in a capture is not looked up, as it is filled at the first replay only.
    """
    sizes = tuple(p.numel() for p in lists[1])
    columns = tuple(tuple(tensor.data_ptr() for tensor in tensors) or (0,) * len(sizes) for tensors in lists)
    key = (device, sizes, columns)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    made, captured = _tables.get(key), []
    if made is None:
        rows = [row for row in zip(sizes, *columns, strict=True) if row[0]]
        made = []
        for aligned in (True, False):
            chosen = [r for r in rows if aligned == (r[0] % 8 == 0 and all(address % 16 == 0 for address in r[2:]))]
            if chosen:
                counts = tuple(row[0] for row in chosen)
                chunks = _chunks_of(counts, device, captured)
                made.append((_to_device(torch.tensor(chosen), device, captured), chunks, aligned))
                if not capturing:
                    _keep(_chunks, (device, counts), chunks)
    if capturing:
        _captured.append((made, captured))
    else:
        _keep(_tables, key, made)
    return made


def _log(beta):
    return math.log(beta) if beta else -1e30


@torch.library.custom_op("soflow::adamw_ema", mutates_args=("params", "exp_avgs", "exp_avg_sqs", "emas", "copies"))
def _adamw_ema(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    emas: list[Tensor], copies: list[Tensor], steps: list[Tensor], lr: Tensor, grad_scale: Tensor | None,
    finite: Tensor | None, ema_decays: Tensor | None, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    n = len(params)
    averages = [emas[i : i + n] for i in range(0, len(emas), n)]
    lists = [steps, params, exp_avgs, exp_avg_sqs, grads, copies, *averages]
    for table, chunks, aligned in _tables_of(lists, params[0].device):
        launch(
            _kernel, (chunks.shape[0],),
            table, chunks, params[0], grads[0], copies[0] if copies else params[0], lr,
            lr if grad_scale is None else grad_scale, lr if finite is None else finite,
            lr if ema_decays is None else ema_decays,
            # 1 - beta of a float32 beta would be off by a millionth.
            beta2, 1 - beta1, 1 - beta2, _log(beta1), _log(beta2), eps, weight_decay,
            SCALED=grad_scale is not None, GUARDED=finite is not None, EMAS=len(averages), COPY=bool(copies),
            ALIGNED=aligned, SLOTS=table.shape[1], BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip


@_adamw_ema.register_fake
def _(params, *rest):
    return None


@torch.no_grad()
def adamw_ema(
    params, grads, exp_avgs, exp_avg_sqs, steps, lr, *, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01,
    grad_scale=None, emas=(), ema_decays=None, copies=None, finite=None,
):  # fmt: skip
    """One AdamW update of many tensors in place, their averages and copies included. Returns nothing.

    params, exp_avgs, exp_avg_sqs: lists of float32 tensors of one device, contiguous; grads: the same shapes, float32,
    bfloat16 or float16; steps: float32 tensors [], the number of this update, from 1; lr: float32 tensor [].
    grad_scale: float32 tensor [] that multiplies the gradients, None: 1. emas: up to three lists like params, with the
    decays ema_decays, float64 [emas], as 1 - d of a float32 d is off by a millionth. copies: a list of bfloat16 or
    float16 tensors that take the new parameters. finite: bool tensor []; where it is False nothing is written.
    float64 parameters take the reference.
    Raises ValueError naming the argument whose type, shape, dtype or device is wrong.
    """
    if not isinstance(params, (list, tuple)):
        raise ValueError(f"adamw_ema: params must be a list of tensors, got {type(params).__name__}")
    if not params:
        return
    wide = check_update(
        params, grads, exp_avgs, exp_avg_sqs, steps, lr, betas, grad_scale, emas, ema_decays, copies, finite
    )
    settings = {"betas": betas, "eps": eps, "weight_decay": weight_decay}
    if wide or not use_kernel(params[0], grads[0]):
        adamw_ema_reference(
            params, grads, exp_avgs, exp_avg_sqs, steps, lr, **settings,
            grad_scale=grad_scale, emas=emas, ema_decays=ema_decays, copies=copies, finite=finite,
        )  # fmt: skip
        return
    _adamw_ema(
        list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), [t for average in emas for t in average],
        list(copies or ()), list(steps), lr, grad_scale,
        None if finite is None else finite.view(torch.uint8), ema_decays if emas else None,
        float(betas[0]), float(betas[1]), float(eps), float(weight_decay),
    )  # fmt: skip


def clip_scale(norm, max_norm):
    """(grad_scale, finite) of `adamw_ema` from a gradient norm [], float32 and bool [] on its device.

    What torch's clipping multiplies by, min(1, max_norm / (norm + 1e-6)), 1 for max_norm 0, which is no clipping; and
    whether the norm, and so every gradient, is finite.
    """
    finite = torch.isfinite(norm)
    scale = torch.ones_like(norm) if not max_norm else (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return scale.float(), finite


class AdamWEMA(torch.optim.AdamW):
    """torch's AdamW whose step is `adamw_ema`: one launch for each group, dtype of gradients and kind of copy.

    Arguments, states and state_dict are AdamW's: each loads the other's. emas: up to three lists of tensors, in the
    order of all parameters of all groups; ema_decays: as many numbers in [0, 1), later the tensor of that name; copies:
    a list of bfloat16 or float16 tensors in that order, None where a parameter has no copy.
    A gradient scaler unscales the gradients itself and skips the step, as for an optimiser that is not fused.
    Raises ValueError for lists that do not fit and for AdamW's own reasons.
    """

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, *, emas=(), ema_decays=(), copies=None
    ):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        everything = [p for group in self.param_groups for p in group["params"]]
        if len(emas) != len(ema_decays) or len(emas) > MAX_EMAS:
            raise ValueError(f"AdamWEMA: emas must be at most {MAX_EMAS} lists and as many decays, got {len(emas)}")
        if any(not 0 <= decay < 1 for decay in ema_decays):
            raise ValueError(f"AdamWEMA: ema_decays must be in [0, 1), got {tuple(ema_decays)}")
        for name, tensors in [("emas", average) for average in emas] + ([] if copies is None else [("copies", copies)]):
            if len(tensors) != len(everything):
                raise ValueError(f"AdamWEMA: {name} must hold {len(everything)} tensors, got {len(tensors)}")
            for p, t in zip(everything, tensors, strict=True):
                if t is not None and t.shape != p.shape:
                    raise ValueError(
                        f"AdamWEMA: {name} must have the parameters' shapes, got {list(t.shape)} for {list(p.shape)}"
                    )
        device = everything[0].device
        self.ema_decays = torch.tensor([float(d) for d in ema_decays], dtype=torch.float64, device=device)
        self._emas = [{p: t for p, t in zip(everything, average, strict=True)} for average in emas]
        self._copies = None if copies is None else dict(zip(everything, copies, strict=True))
        self._lr = torch.zeros((), dtype=torch.float32, device=device)
        # torch's fused AdamW reads the scale that a gradient scaler sets as its attribute; this step does not.
        self._step_supports_amp_scaling = False

    def __getstate__(self):
        """For deepcopy and pickle, to which torch gives its own three attributes only."""
        own = {name: getattr(self, name) for name in ("ema_decays", "_emas", "_copies", "_lr")}
        return {**super().__getstate__(), **own, "_step_supports_amp_scaling": False}

    def add_param_group(self, param_group):
        """torch's; refused where there are averages or copies, which would lack the new parameters."""
        if getattr(self, "_emas", ()) or getattr(self, "_copies", None) is not None:
            raise ValueError("AdamWEMA: no group can be added: it has no averages or copies")
        unwrap(torch.optim.AdamW.add_param_group)(self, param_group)

    # torch wraps these for its compiler to leave them alone, and the wrapper imports the compiler, which takes seconds.
    state_dict = unwrap(torch.optim.AdamW.state_dict)
    load_state_dict = unwrap(torch.optim.AdamW.load_state_dict)
    zero_grad = unwrap(torch.optim.AdamW.zero_grad)

    @torch.no_grad()
    def step(self, closure=None, *, grad_scale=None, finite=None):
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
                    copied = self._copies is not None and self._copies[p] is not None
                    kinds.setdefault((p.grad.dtype, copied), []).append(p)
            for (_, copied), chosen in kinds.items():
                self._step(group, chosen, copied, grad_scale, finite)
        return loss

    def _step(self, group, params, copied, grad_scale, finite):
        states = [self._state(p) for p in params]
        lr = group["lr"]
        if isinstance(lr, Tensor):
            lr = lr.reshape(()).to(self._lr, non_blocking=True)
        else:
            lr = self._lr.fill_(lr)
        lists = [[p.grad for p in params], *([s[key] for s in states] for key in ("exp_avg", "exp_avg_sq", "step"))]
        others = {
            "betas": group["betas"],
            "grad_scale": grad_scale,
            "emas": [[average[p] for p in params] for average in self._emas],
            "ema_decays": self.ema_decays,
            "copies": [self._copies[p] for p in params] if copied and self._copies is not None else None,
            "finite": finite,
        }
        check_update(params, *lists, lr, **others)  # before the steps are counted
        steps = lists[-1]
        torch._foreach_add_(steps, 1 if finite is None else [finite.float()] * len(steps))
        adamw_ema(params, *lists, lr, eps=group["eps"], weight_decay=group["weight_decay"], **others)

    def _state(self, p):
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        elif state["step"].device != p.device:  # as torch keeps it unless its own fused kernel runs
            state["step"] = state["step"].to(p.device)
        return state


def inspect_cases():
    """(label, call): with and without averages, copies and scale, for `python -m soflow_kernels.inspect`."""
    for grad in (torch.float32, torch.bfloat16):
        for averages, copies in ((0, False), (1, False), (1, True), (3, True)):
            p, g = torch.zeros(4096), torch.zeros(4096, dtype=grad)
            one, decays = torch.zeros(()), torch.zeros(averages, dtype=torch.float64) if averages else None
            call = partial(
                _adamw_ema, [p], [g], [p], [p], [p] * averages, [p.bfloat16()] * copies, [one], one, one,
                torch.ones((), dtype=torch.uint8), decays, 0.9, 0.99, 1e-8, 0.0,
            )  # fmt: skip
            size = f"{averages} averages{', copy' * copies}, {str(grad)[6:]} gradients"
            yield f"adamw_ema {size}", call
