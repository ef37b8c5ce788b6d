"""What `adamw_ema` and its optimiser check of their arguments."""

import torch
from torch import Tensor

MAX_EMAS = 3
GRAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COPY_DTYPES = (torch.bfloat16, torch.float16)


def check_update(params, grads, exp_avgs, exp_avg_sqs, steps, lr, betas, grad_scale, emas, ema_decays, copies, finite):
    """Raise ValueError naming the argument that is wrong. Returns whether the parameters are float64."""
    wide = isinstance(params[0], Tensor) and params[0].dtype == torch.float64
    single = (torch.float64,) if wide else (torch.float32,)
    if not isinstance(params[0], Tensor):
        raise ValueError(f"adamw_ema: params must be a list of tensors, got {type(params[0]).__name__} in it")
    for name, tensors in (("params", params), ("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs)):
        _check_list(name, tensors, params, single)
    _check_list("grads", grads, params, single if wide else GRAD_DTYPES)
    _check_list("steps", steps, params, (torch.float32,))
    if not isinstance(emas, (list, tuple)) or len(emas) > MAX_EMAS:
        raise ValueError(f"adamw_ema: emas must be at most {MAX_EMAS} lists, got {_number_of(emas)}")
    for j, average in enumerate(emas):
        _check_list(f"emas[{j}]", average, params, single)
    if copies is not None:
        _check_list("copies", copies, params, COPY_DTYPES)
    if emas and ema_decays is None:
        raise ValueError(f"adamw_ema: ema_decays must be a float64 tensor of shape [{len(emas)}], got NoneType")
    if not isinstance(betas, (list, tuple)) or len(betas) != 2 or any(not 0 <= beta < 1 for beta in betas):
        raise ValueError(f"adamw_ema: betas must be two numbers in [0, 1), got {betas!r}")
    if not isinstance(lr, Tensor):
        raise ValueError(f"adamw_ema: lr must be a float32 tensor of shape [], got {type(lr).__name__}")
    _check_scalar("lr", lr, (), params[0])
    _check_scalar("grad_scale", grad_scale, (), params[0])
    _check_scalar("ema_decays", ema_decays, (len(emas),), params[0], (torch.float64,))
    _check_scalar("finite", finite, (), params[0], (torch.bool,))
    return wide


def _number_of(values):
    return len(values) if isinstance(values, (list, tuple)) else type(values).__name__


def _check_list(name, tensors, params, dtypes):
    op = "adamw_ema"
    if not isinstance(tensors, (list, tuple)) or len(tensors) != len(params):
        raise ValueError(f"{op}: {name} must be a list of {len(params)} tensors, got {type(tensors).__name__}")
    for i, (tensor, p) in enumerate(zip(tensors, params, strict=True)):
        shape = torch.Size([]) if name == "steps" else p.shape
        if not isinstance(tensor, Tensor) or tensor.shape != shape:
            got = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{op}: {name}[{i}] must be a tensor of shape {list(shape)}, got {got}")
        if tensor.dtype not in dtypes or tensor.dtype != tensors[0].dtype:
            known = ", ".join(str(dtype)[6:] for dtype in dtypes)
            raise ValueError(f"{op}: {name}[{i}] must be {known}, all alike, got {tensor.dtype}")
        if tensor.device != p.device or p.device != params[0].device:
            raise ValueError(f"{op}: {name}[{i}] must be on {params[0].device}, got {tensor.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {name}[{i}] must be contiguous, got strides {tensor.stride()}")


def _check_scalar(name, value, shape, like, dtypes=(torch.float32,)):
    if value is None:
        return
    if not isinstance(value, Tensor) or tuple(value.shape) != shape or value.dtype not in dtypes:
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"adamw_ema: {name} must be a {str(dtypes[0])[6:]} tensor of shape {list(shape)}, got {got}")
    if value.device != like.device:
        raise ValueError(f"adamw_ema: {name} must be on {like.device}, got {value.device}")
