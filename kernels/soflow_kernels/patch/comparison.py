"""A module before and after, on a small input: what looks like a DiT block is patched only if it computes the same."""

import inspect
import math
from typing import Any

import torch

from soflow_kernels.patch.forwards import patched_class
from soflow_kernels.patch.structure import Form, Mismatch


def compare(module: Any, form: Form, tokens: int, positions: Any = None) -> None:
    """Raise Mismatch unless the kernels compute what the module's own forward does, in evaluation and in training.

    tokens: of the input. positions: what the model hands to a block that takes a third argument; None: a function that
    turns queries and keys stands in for it.
    """
    last = module.norm1.linear if form.kind == "diffusers block" else module.adaLN_modulation
    weight = next(last.parameters())
    if weight.is_meta:
        raise Mismatch("its parameters have no values yet (device meta): patch when they have")
    arguments, keywords = (_wave(weight, 2, tokens, form.width),), {}
    if form.kind == "diffusers block":
        times = torch.tensor([10, 700], device=weight.device)
        keywords = {"timestep": times, "class_labels": torch.zeros_like(times)}
    else:
        arguments += (_wave(weight, 2, weight.shape[1]),)
    calls = [arguments]
    if form.positions is not None:
        without = calls if form.positions.default is not inspect.Parameter.empty else []
        calls = [*without, (*arguments, _turned if positions is None else positions)]
    if _recomputes(module, calls[-1], keywords):
        raise Mismatch("it recomputes itself in the backward, which would be lost: checkpoint around the block")
    classes = (patched_class(type(module), form.kind, form.rms), type(module))
    modes = {m: m.training for m in module.modules()}
    why = None
    try:
        with torch.no_grad():
            for mode in ("evaluation", "training"):
                module.train(mode == "training")
                for given in calls:
                    if why is None and not _same(*(_try(module, cls, given, keywords) for cls in classes)):
                        why = f"in {mode} it computes something else than a DiT's, from the same input and weights"
    except Exception as error:
        what = (str(error).strip().splitlines() or [""])[0]
        why = f"it cannot be tried on {tokens} tokens ({type(error).__name__}: {what})"
    finally:
        for m, training in modes.items():
            m.training = training
    if why is not None:
        raise Mismatch(why)


def _tolerance(dtype):
    """Relative, of that comparison: above rounding (TF32's in float32), far below another order of the modulation."""
    return max(1e-3, 8 * torch.finfo(dtype).eps)


def _wave(like, *shape):
    """Numbers in [-1, 1] without a pattern, and no random generator's."""
    n = torch.arange(1, 1 + math.prod(shape), dtype=torch.float64)
    return torch.sin(0.7391 * n * n).reshape(shape).to(like)


def _turned(heads):
    """In place of a rotary embedding: large enough that attention, whose logits are small here, attends elsewhere."""
    return 2 * heads + 8 * heads.roll(1, -1)


def _stand_in(parameter):
    """Values that hide nothing: in a fresh DiT zeros make a block the identity, and the final layer zero."""
    scale = math.sqrt(2 / parameter[0].numel()) if parameter.dim() > 1 else 0.3
    return scale * _wave(parameter, *parameter.shape) if parameter.is_floating_point() else parameter


def _try(module, cls, arguments, keywords):
    """The module's output as an instance of `cls`. Parameters, buffers and random states stay as they are."""
    values = {name: _stand_in(p) for name, p in module.named_parameters()}
    values |= {name: b.clone() for name, b in module.named_buffers()}
    device, base = arguments[0].device, type(module)
    module.__class__ = cls
    try:
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.autocast(device.type, enabled=False),
            torch.compiler.set_stance("force_eager"),  # a forward that is decorated with torch.compile
        ):
            return torch.func.functional_call(module, values, arguments, keywords)
    finally:
        module.__class__ = base


def _same(got, wanted):
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return False
    return bool((got - wanted).float().norm() <= _tolerance(wanted.dtype) * wanted.float().norm())


def _recomputes(module, arguments, keywords):
    """Whether the module keeps next to nothing for its backward, as one that checkpoints its own forward does."""
    saved = []
    arguments = tuple(a.clone().requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda packed: packed):
        try:
            out = _try(module, type(module), arguments, keywords)
        except Exception:  # the comparison will say why
            return False
    return isinstance(out, torch.Tensor) and out.requires_grad and len(saved) < 4
