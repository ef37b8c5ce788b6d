"""Which modules are what: the blocks and final layers of other people's models, told by their parts."""

import inspect
from typing import Any, NamedTuple

from torch import nn


class Mismatch(Exception):
    """Why a module that looks like a DiT block is none that we know."""


class Form(NamedTuple):
    """What a module is."""

    kind: str
    """A key of `forwards.FORWARDS`."""
    width: int
    rms: type | None
    """The class of its RMSNorms, None if it has none."""
    positions: inspect.Parameter | None = None
    """The third argument of its forward, which goes on to the attention; None if it takes two."""


def recognise(module: Any) -> Form | None:
    """The form of a module, None if it looks like no part of a DiT. Raises Mismatch if its form is unknown."""
    parts = dict(module.named_children())
    if "adaLN_modulation" in parts:
        if {"norm_final", "linear"} <= set(parts):
            _check_children(module, ("norm_final", "linear", "adaLN_modulation"))
            width, rms = _norms(norm_final=module.norm_final)
            _check_modulation("adaLN_modulation", module.adaLN_modulation, width, 2)
            _check_call(module)
            return Form("final layer", width, rms)
        wanted = ("norm1", "attn", "norm2", "mlp", "adaLN_modulation")
        missing = [name for name in wanted if name not in parts]
        if missing:
            raise Mismatch(f"it has no {', '.join(missing)}")
        _check_children(module, wanted)
        width, rms = _norms(norm1=module.norm1, norm2=module.norm2)
        _check_modulation("adaLN_modulation", module.adaLN_modulation, width, 6, 4)
        return Form("block", width, rms, _check_call(module, module.attn))
    if "attn1" in parts and "ff" in parts and hasattr(module, "norm_type"):
        if module.norm_type != "ada_norm_zero":
            raise Mismatch(f"its norm_type is {module.norm_type!r}, not 'ada_norm_zero'")
        _check_children(module, ("norm1", "attn1", "norm3", "ff"))
        if getattr(module.norm1, "emb", None) is None:
            raise Mismatch("norm1 has no embedding of its own")
        width = _layernorm("norm1.norm", module.norm1.norm)
        _layernorm("norm3", module.norm3)
        _check_modulation("norm1.linear", module.norm1.linear, width, 6)
        if getattr(module, "pos_embed", None) is not None or getattr(module, "only_cross_attention", False):
            raise Mismatch("it has positions or cross-attention of its own")
        return Form("diffusers block", width, None)
    return None


def mlp_layers(mlp):
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


def _norms(**norms) -> tuple[int, type | None]:
    """(width, class of the RMSNorms or None) of norms that the kernels may compute, all of one width."""
    widths, classes = set(), set()
    for name, norm in norms.items():
        if type(norm) is nn.LayerNorm:
            widths.add(_layernorm(name, norm))
        else:
            widths.add(_rmsnorm(name, norm))
            classes.add(type(norm))
    if len(widths) > 1 or len(classes) > 1:
        raise Mismatch(f"{' and '.join(norms)} are of different classes or widths")
    return widths.pop(), classes.pop() if classes else None


def _layernorm(name, norm) -> int:
    if type(norm) is not nn.LayerNorm:
        raise Mismatch(f"{name} is {type(norm).__name__}, not torch.nn.LayerNorm")
    if norm.elementwise_affine:
        raise Mismatch(f"{name} has a weight of its own (elementwise_affine), which adaLN has not")
    if len(norm.normalized_shape) != 1:
        raise Mismatch(f"{name} is over {len(norm.normalized_shape)} dimensions, not the last one alone")
    return norm.normalized_shape[0]


def _rmsnorm(name, norm) -> int:
    """The width of what may be an RMSNorm by its parts: a weight or none, and eps. The comparison tells if it is."""
    what = f"{name} is {type(norm).__name__}, neither torch.nn.LayerNorm nor RMSNorm"
    parameters = dict(norm.named_parameters())
    if any(norm.children()) or set(parameters) - {"weight"}:
        raise Mismatch(what)
    # torch.nn.RMSNorm without one takes that of a dtype, and releases differ in which.
    if not isinstance(getattr(norm, "eps", None), float):
        raise Mismatch(f"{what}, as it has no eps of its own")
    shape = parameters["weight"].shape if parameters else tuple(getattr(norm, "normalized_shape", ()))
    if len(shape) != 1:
        raise Mismatch(f"{what} over the last dimension")
    return shape[0]


def _check_modulation(name, module, width, *parts):
    last = module[-1] if isinstance(module, nn.Sequential) and len(module) else module
    if not isinstance(last, nn.Linear) or last.out_features not in [n * width for n in parts]:
        raise Mismatch(f"{name} does not end with a Linear to {' or '.join(f'{n} x {width}' for n in parts)}")


def _check_call(module, attention=None) -> inspect.Parameter | None:
    """The third parameter of the module's forward, which an attention may take after its input; None if it has two."""
    found = list(inspect.signature(type(module).forward).parameters.values())[1:]
    plain = all(p.kind is p.POSITIONAL_OR_KEYWORD for p in found)
    if plain and len(found) == 2:
        return None
    if plain and len(found) == 3 and attention is not None:
        takes = list(inspect.signature(type(attention).forward).parameters.values())[1:]
        if len(takes) > 1 and takes[1].kind is takes[1].POSITIONAL_OR_KEYWORD:
            return found[2]
    raise Mismatch(f"its forward takes ({', '.join(p.name for p in found)}), not (x, c)")


def _check_children(module, wanted):
    if "forward" in vars(module):
        raise Mismatch("its forward was replaced on the instance, as wrappers do: patch before they wrap")
    extra = [name for name, _ in module.named_children() if name not in wanted]
    extra += [name for name, _ in module.named_parameters(recurse=False)]
    if extra:
        raise Mismatch(f"it also has {', '.join(extra)}")
