"""The kernels in other people's diffusion transformers: `patch_dit(model)`.

Recognised by structure, whatever the classes are called:

* the block of DiT (arXiv 2212.09748) and SiT (arXiv 2401.08740): norm1, attn, norm2, mlp, adaLN_modulation, called as
  block(x, c); shift, scale and gate of the attention and of the MLP are the six parts of adaLN_modulation(c);
* their final layer: norm_final, linear, adaLN_modulation, called as layer(x, c);
* the block of diffusers' DiTTransformer2DModel: norm1 (with its embedding), attn1, norm3, ff.

A block then makes four passes over its tokens besides products and attention: LayerNorm and modulation; gated residual,
LayerNorm and modulation; bias and GELU, where the MLP is two products around a tanh GELU; gated residual. Parameters,
buffers and the keys of the state_dict stay as they are.
"""

import functools
import inspect
import math
from typing import TypeVar

import torch
from torch import nn

from soflow_kernels.adaln import gate_residual_layernorm_modulate, layernorm_modulate
from soflow_kernels.gated_residual import gate_residual
from soflow_kernels.gelu import linear_gelu

Model = TypeVar("Model", bound=nn.Module)

TOKENS = 16
"""Tokens of the input on which a block is compared before and after, where the model does not say how many it takes."""


def _tolerance(dtype):
    """Relative, of that comparison: above rounding (TF32's in float32), far below another order of the modulation."""
    return max(1e-3, 8 * torch.finfo(dtype).eps)


class _Mismatch(Exception):
    """Why a module that looks like a DiT block is none that we know."""


# What the patched modules do.


def _mlp(mlp, h):
    """mlp(h), its first product and GELU by the kernel where nothing else happens in between."""
    inner, outer = _layers(mlp)
    if inner is None or outer is None or not _unwatched(mlp) or _drops(mlp):
        return mlp(h)
    return outer(linear_gelu(h, inner.weight, inner.bias))


def _rows(x, m):
    """Tokens and modulations of as many samples each; one row of either serves all."""
    samples, rows = x.shape[0], m.shape[0]  # len() would fix a batch of any size, for torch.export
    if samples == rows:
        return x, m
    return (x, m.expand(samples, -1)) if rows == 1 else (x.expand(rows, -1, -1), m)


def _fusable(*norms):
    """Whether these norms, which the kernels compute, are still plain, and nobody watches their calls."""
    return all(type(m) is nn.LayerNorm and not m.elementwise_affine and _unwatched(m) for m in norms)


def _block(self, x, c):
    # A condition for every token, say.
    if x.dim() != 3 or c.dim() != 2 or not _fusable(self.norm1, self.norm2):
        return self._soflow_base.forward(self, x, c)
    x, modulation = _rows(x, self.adaLN_modulation(c))
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)
    attended = self.attn(layernorm_modulate(x, shift, scale, self.norm1.eps))
    x, h = gate_residual_layernorm_modulate(x, attended, gate, shift_mlp, scale_mlp, eps=self.norm2.eps)
    return gate_residual(x, _mlp(self.mlp, h), gate_mlp)


def _final(self, x, c):
    if x.dim() != 3 or c.dim() != 2 or not _fusable(self.norm_final):
        return self._soflow_base.forward(self, x, c)
    x, modulation = _rows(x, self.adaLN_modulation(c))
    shift, scale = modulation.chunk(2, dim=1)
    return self.linear(layernorm_modulate(x, shift, scale, self.norm_final.eps))


def _diffusers_block(
    self, hidden_states, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None, timestep=None,
    cross_attention_kwargs=None, class_labels=None, added_cond_kwargs=None,
):  # fmt: skip
    x, options = hidden_states, dict(cross_attention_kwargs or {})
    plain = _fusable(self.norm1.norm, self.norm3) and _unwatched(self.norm1)
    if self._chunk_size is not None or "gligen" in options or x.dim() != 3 or not plain:
        return self._soflow_base.forward(
            self, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
            cross_attention_kwargs, class_labels, added_cond_kwargs,
        )  # fmt: skip
    c = self.norm1.emb(timestep, class_labels, hidden_dtype=x.dtype)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.norm1.linear(self.norm1.silu(c)).chunk(6, dim=1)
    h = layernorm_modulate(x, shift, scale, self.norm1.norm.eps)
    attended = self.attn1(h, encoder_hidden_states=None, attention_mask=attention_mask, **options)
    x, h = gate_residual_layernorm_modulate(x, attended, gate, shift_mlp, scale_mlp, eps=self.norm3.eps)
    return gate_residual(x, _mlp(self.ff, h), gate_mlp)


FORWARDS = {"block": _block, "final layer": _final, "diffusers block": _diffusers_block}


# Which modules are what.


def _layers(mlp):
    """(first, second) product of an MLP of Linear, tanh GELU, Linear and nothing but dropout, else (None, None)."""
    children = dict(mlp.named_children())
    if {"fc1", "act", "fc2"} <= set(children):  # timm's
        inner, gelu = children.pop("fc1"), children.pop("act")
        rest = list(children.values())
    elif isinstance(children.get("net"), nn.ModuleList) and len(mlp.net) > 1:  # diffusers', whose GELU has the product
        gelu, *rest = mlp.net
        inner = getattr(gelu, "proj", None)
    elif type(mlp) is nn.Sequential and len(mlp) > 2:
        inner, gelu, *rest = mlp
    else:
        return None, None
    outer = [m for m in rest if isinstance(m, nn.Linear)]
    harmless = all(isinstance(m, (nn.Linear, nn.Dropout, nn.Identity)) for m in rest)
    tanh = getattr(gelu, "approximate", None) == "tanh" and all(m is inner for m in gelu.children())
    if not (harmless and tanh and type(inner) is nn.Linear and inner.bias is not None and len(outer) == 1):
        return None, None
    return (inner, outer[0]) if inner.out_features == outer[0].in_features else (None, None)


def _drops(mlp):
    return any(isinstance(m, nn.Dropout) and m.p > 0 and m.training for m in mlp.modules())


def _unwatched(mlp):
    """Whether nobody has hooked into these modules, most of which would be passed over, or wrapped their forward."""
    watchers = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    everywhere = any(getattr(nn.modules.module, f"_global{name}", None) for name in watchers)
    return not everywhere and not any(
        "forward" in vars(m) or any(getattr(m, name) for name in watchers) for m in mlp.modules()
    )


def _check_norm(name, norm):
    if type(norm) is not nn.LayerNorm:
        raise _Mismatch(f"{name} is {type(norm).__name__}, not torch.nn.LayerNorm")
    if norm.elementwise_affine:
        raise _Mismatch(f"{name} has a weight of its own (elementwise_affine), which adaLN has not")
    if len(norm.normalized_shape) != 1:
        raise _Mismatch(f"{name} is over {len(norm.normalized_shape)} dimensions, not the last one alone")
    return norm.normalized_shape[0]


def _check_modulation(name, module, width, parts):
    last = module[-1] if isinstance(module, nn.Sequential) and len(module) else module
    if not isinstance(last, nn.Linear) or last.out_features != parts * width:
        raise _Mismatch(f"{name} does not end with a Linear to {parts} x {width}")


def _check_call(module, names):
    found = [p.name for p in list(inspect.signature(type(module).forward).parameters.values())[1:]]
    if len(found) != names:
        raise _Mismatch(f"its forward takes ({', '.join(found)}), not (x, c)")


def _check_children(module, wanted):
    if "forward" in vars(module):
        raise _Mismatch("its forward was replaced on the instance, as wrappers do: patch before they wrap")
    extra = [name for name, _ in module.named_children() if name not in wanted]
    extra += [name for name, _ in module.named_parameters(recurse=False)]
    if extra:
        raise _Mismatch(f"it also has {', '.join(extra)}")


def _recognise(module):
    """(kind, width) of a module, None if it looks like no part of a DiT. Raises _Mismatch if its form is unknown."""
    parts = dict(module.named_children())
    if "adaLN_modulation" in parts:
        if {"norm_final", "linear"} <= set(parts):
            _check_children(module, ("norm_final", "linear", "adaLN_modulation"))
            width = _check_norm("norm_final", module.norm_final)
            _check_modulation("adaLN_modulation", module.adaLN_modulation, width, 2)
            _check_call(module, 2)
            return "final layer", width
        wanted = ("norm1", "attn", "norm2", "mlp", "adaLN_modulation")
        missing = [name for name in wanted if name not in parts]
        if missing:
            raise _Mismatch(f"it has no {', '.join(missing)}")
        _check_children(module, wanted)
        width = _check_norm("norm1", module.norm1)
        _check_norm("norm2", module.norm2)
        _check_modulation("adaLN_modulation", module.adaLN_modulation, width, 6)
        _check_call(module, 2)
        return "block", width
    if "attn1" in parts and "ff" in parts and hasattr(module, "norm_type"):
        if module.norm_type != "ada_norm_zero":
            raise _Mismatch(f"its norm_type is {module.norm_type!r}, not 'ada_norm_zero'")
        _check_children(module, ("norm1", "attn1", "norm3", "ff"))
        if getattr(module.norm1, "emb", None) is None:
            raise _Mismatch("norm1 has no embedding of its own")
        width = _check_norm("norm1.norm", module.norm1.norm)
        _check_norm("norm3", module.norm3)
        _check_modulation("norm1.linear", module.norm1.linear, width, 6)
        if getattr(module, "pos_embed", None) is not None or getattr(module, "only_cross_attention", False):
            raise _Mismatch("it has positions or cross-attention of its own")
        return "diffusers block", width
    return None


@functools.cache
def _patched_class(base, kind):
    """A subclass of `base` whose forward runs the kernels. Copies of its instances are rebuilt from `base`."""

    def reduce(self, protocol):
        return _rebuild, (base, kind), self.__dict__

    names = {
        "forward": _named(FORWARDS[kind], base, kind),
        "__reduce_ex__": reduce,
        "_soflow_base": base,
        "__module__": base.__module__,
    }
    return type(base.__name__, (base,), names)


def _named(forward, base, kind):
    """`forward` of (x, c) under the names that the base's own forward gives its arguments."""
    names = [p.name for p in list(inspect.signature(base.forward).parameters.values())[1:]]
    if kind == "diffusers block" or names == ["x", "c"]:
        return forward

    def renamed(self, *arguments, **keywords):
        found = dict(zip(names, arguments, strict=False))
        if len(arguments) > 2 or set(keywords) != set(names) - set(found):
            raise TypeError(f"forward takes ({', '.join(names)})")
        return forward(self, *((found | keywords)[name] for name in names))

    return renamed


def _rebuild(base, kind):
    cls = _patched_class(base, kind)
    return cls.__new__(cls)


def _wave(like, *shape):
    """Numbers in [-1, 1] without a pattern, and no random generator's."""
    n = torch.arange(1, 1 + math.prod(shape), dtype=torch.float64)
    return torch.sin(0.7391 * n * n).reshape(shape).to(like)


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
    arguments = tuple(a.clone().requires_grad_() for a in arguments)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda packed: packed):
        try:
            out = _try(module, type(module), arguments, keywords)
        except Exception:  # the comparison will say why
            return False
    return isinstance(out, torch.Tensor) and out.requires_grad and len(saved) < 4


def _compare(module, kind, width, tokens):
    """Raise _Mismatch unless the kernels compute what the module's own forward does, in evaluation and in training."""
    last = module.norm1.linear if kind == "diffusers block" else module.adaLN_modulation
    weight = next(last.parameters())
    if weight.is_meta:
        raise _Mismatch("its parameters have no values yet (device meta): patch when they have")
    arguments, keywords = (_wave(weight, 2, tokens, width),), {}
    if kind == "diffusers block":
        times = torch.tensor([10, 700], device=weight.device)
        keywords = {"timestep": times, "class_labels": torch.zeros_like(times)}
    else:
        arguments += (_wave(weight, 2, weight.shape[1]),)
    if _recomputes(module, arguments, keywords):
        raise _Mismatch("it recomputes itself in the backward, which would be lost: checkpoint around the block")
    classes = (_patched_class(type(module), kind), type(module))
    modes = {m: m.training for m in module.modules()}
    why = None
    try:
        with torch.no_grad():
            for mode in ("evaluation", "training"):
                module.train(mode == "training")
                if why is None and not _same(*(_try(module, cls, arguments, keywords) for cls in classes)):
                    why = f"in {mode} it computes something else than a DiT's, from the same input and weights"
    except Exception as error:
        what = (str(error).strip().splitlines() or [""])[0]
        why = f"it cannot be tried on {tokens} tokens ({type(error).__name__}: {what})"
    finally:
        for m, training in modes.items():
            m.training = training
    if why is not None:
        raise _Mismatch(why)


def patch_dit(model: Model) -> Model:
    """Put the kernels into the blocks of somebody else's DiT, in place; returns the model.

    model: a torch.nn.Module with blocks of the forms in the module's docstring, anywhere inside. Their parameters, and
    the keys of the state_dict, do not change; outputs and gradients are the same within rounding. Every
    block is run on a small input before and after, which must agree: so patch a model before it is wrapped, sharded or
    compiled, on a device that computes. Patching again changes nothing. A block whose norm somebody hooks or replaces
    runs its own forward, and so does an MLP; other layers are called as they are: a LoRA keeps its effect.
    Raises ValueError, and changes nothing, if there is no such block, or one that looks like it but is of another form:
    its place, its class and what differs are named.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"patch_dit: model must be a torch.nn.Module, got {type(model).__name__}")
    pos = getattr(model, "pos_embed", None)
    tokens = pos.shape[1] if isinstance(pos, torch.Tensor) and pos.dim() == 3 else TOKENS
    found, patched = [], 0
    for path, module in model.named_modules():
        if hasattr(type(module), "_soflow_base"):
            patched += 1
            continue
        try:
            recognised = _recognise(module)
            if recognised is None:
                continue
            kind, width = recognised
            _compare(module, kind, width, tokens)
        except _Mismatch as mismatch:
            where = path or "the model itself"
            raise ValueError(f"patch_dit: {where} ({type(module).__name__}) is no DiT block: {mismatch}") from None
        found.append((module, kind))
    if not patched and all(kind == "final layer" for _, kind in found):
        raise ValueError(
            f"patch_dit: found no DiT block in {type(model).__name__}: none has norm1, attn, norm2, mlp and "
            "adaLN_modulation, or is a diffusers block of norm_type 'ada_norm_zero'"
        )
    for module, kind in found:
        module.__class__ = _patched_class(type(module), kind)
    return model
