"""Whether a module is as it was made: nobody replaced, wrapped, hooked, pruned or quantised a part of it.

The fused path computes with the parameters of such modules without calling them. Anything else is called, so that what
acts through `Module.__call__`, or in the place of a layer, takes effect. What `sharding.shard` makes of a module is
known; what somebody else shards counts as wrapped.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.func import functional_call
from torch.nn.modules import module as torch_module


class PlainKind(NamedTuple):
    """The parts of a new module of a type."""

    forward: Callable[..., Any]
    """The type's forward, as it was when this was noted."""
    parameters: tuple[str, ...]
    children: Mapping[str, type[nn.Module]]


Kinds = Mapping[type[nn.Module], PlainKind]


def plain_kind(
    kind: type[nn.Module], children: Mapping[str, type[nn.Module]] | None = None, parameters: tuple[str, ...] = ()
) -> dict[type[nn.Module], PlainKind]:
    """An entry of `Kinds`: `kind` with the names and exact types of its submodules and the names of its parameters."""
    return {kind: PlainKind(kind.forward, parameters, children or {})}


PLAIN_LAYERS: Kinds = {
    **plain_kind(nn.Linear, parameters=("weight", "bias")),
    **plain_kind(nn.Conv2d, parameters=("weight", "bias")),
    **plain_kind(nn.SiLU),
}


class ShardedModule(NamedTuple):
    """What FSDP made of one module."""

    plain: type[nn.Module]
    """Its type before."""
    kind: type[nn.Module]
    pre_hooks: frozenset[int]
    """The keys of FSDP's own hooks before the forward."""
    hooks: frozenset[int]


class Sharding(NamedTuple):
    """What FSDP made of a network."""

    modules: Mapping[nn.Module, ShardedModule]
    """The network itself, and the units that are gathered one by one."""
    tensor: type[Tensor]
    """The type of parameters while they are not gathered."""

    def made(self, module: nn.Module, kind: type[nn.Module], plain: PlainKind) -> bool:
        """Whether the type of a module is the one that FSDP gave to a module of type `kind`."""
        own = self.modules.get(module)
        return own is not None and own.plain is kind and type(module) is own.kind and own.kind.forward is plain.forward


def has_hooks(module: nn.Module, sharding: Sharding | None) -> bool:
    """Whether a module has hooks around its forward, beside those of FSDP."""
    m: Any = module
    if not (m._forward_hooks or m._forward_pre_hooks):
        return False
    own = None if sharding is None else sharding.modules.get(module)
    return own is None or (m._forward_pre_hooks.keys(), m._forward_hooks.keys()) != (own.pre_hooks, own.hooks)


def changed_part(
    module: nn.Module,
    kind: type[nn.Module],
    kinds: Kinds,
    *,
    float8: bool = False,
    sharding: Sharding | None = None,
) -> str | None:
    """The dotted name of the first part of `module` that is not as a new one of type `kind` has it, "" for the module
    itself; None: all are. float8: a linear layer of torchao's float8 recipe passes too; sharding: and what this says
    that FSDP made."""
    # A walk over 300 modules at every forward of the largest network: plain loops, the likeliest questions first.
    m: Any = module
    plain, parameters, children = kinds[kind], m._parameters, m._modules
    if type(m) is not kind:
        known = float8 and kind is nn.Linear and is_float8(m)
        if not known and (sharding is None or not sharding.made(m, kind, plain)):
            return ""
    elif kind.forward is not plain.forward:
        return ""
    if (m._forward_hooks or m._forward_pre_hooks) and has_hooks(m, sharding):
        return ""
    if m._backward_hooks or m._backward_pre_hooks:
        return ""
    if "forward" in m.__dict__ or m._compiled_call_impl is not None:
        return ""
    if (kind is nn.Conv2d and not _cuts_patches(m)) or (issubclass(kind, nn.Embedding) and not _looks_up(m)):
        return ""
    if len(parameters) != len(plain.parameters) or len(children) != len(plain.children):
        return ""
    for name in plain.parameters:
        value = parameters.get(name)
        if not _is_plain_tensor(value) and (sharding is None or type(value) is not sharding.tensor):
            return ""
    for name, part in plain.children.items():
        child = children.get(name)
        found = "" if child is None else changed_part(child, part, kinds, float8=float8, sharding=sharding)
        if found is not None:
            return f"{name}.{found}" if found else name
    return None


def _cuts_patches(layer: Any) -> bool:
    """Whether a convolution is a linear layer on square patches side by side."""
    height, width = layer.kernel_size
    dense = layer.padding == (0, 0) and layer.dilation == (1, 1) and layer.groups == 1
    return dense and height == width and layer.stride == layer.kernel_size


def _looks_up(table: Any) -> bool:
    """Whether an embedding returns rows of its table, and does nothing else."""
    return table.max_norm is None and table.padding_idx is None and not table.scale_grad_by_freq and not table.sparse


def _is_plain_tensor(value: Any) -> bool:
    kind = type(value)
    return kind is nn.Parameter or kind is Tensor or isinstance(value, FakeTensor)


def watched_everywhere() -> bool:
    """Whether a hook of all modules is set, as by `torch.nn.modules.module.register_module_forward_hook`."""
    return bool(torch_module._has_any_global_hook())


def is_float8(layer: nn.Module) -> bool:
    """Whether a layer is of torchao's float8 training recipe."""
    return type(layer).__module__.startswith("torchao.float8.")


def call_layer(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)` in the dtype of x: its floating parameters are cast for the call, hooks and all else act as they do.

    A layer whose parameters are tensors of another kind (quantised, say) is called in its own dtype. A float8 layer
    multiplies bfloat16 in float8; float32 is not what it is for, and takes its weight as it is.
    """
    if is_float8(layer) and x.dtype.itemsize > 2:
        return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))  # pyright: ignore[reportArgumentType,reportCallIssue]
    others = {name: p for name, p in layer.named_parameters() if p.is_floating_point() and p.dtype != x.dtype}
    if not others:
        return layer(x)
    if all(_is_plain_tensor(p) for p in others.values()):
        return functional_call(layer, {name: p.to(x.dtype) for name, p in others.items()}, (x,))
    return layer(x.to(next(iter(others.values())).dtype)).to(x.dtype)
