"""A network whose parameters are cut over ranks by FSDP2, and how its parts are gathered for the time of their use.

Each block is a unit, and so is the modulation of the last norm, which has the dtype of the blocks; the two ends belong
to the network itself. With gradient a unit is gathered by FSDP's own hooks, around its forward and around its backward;
without, one after the other, each while the one before computes. Nothing stays gathered after a forward, so that an
optimiser may write to the shards at any time.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from ..errors import ConfigError
from .plain_layers import ShardedModule, Sharding, is_float8

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Pending = TypeVar("Pending")


class Unit:
    """A module of a DiT that is gathered as a whole."""

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """`function(self, *arguments)`: a forward of this module. In a sharded network FSDP gathers its parameters for
        that and for its backward. Nothing that is returned may be a parameter, or a view with gradient."""
        return function(self, *arguments)


def shard(network: Any, mesh: "DeviceMesh", *, blocks: torch.dtype | None, reduce: torch.dtype | None) -> None:
    """Cut the parameters of a DiT over the ranks of a mesh, in place, on any device: on "meta" they are filled later.

    The parameters become DTensors in their own dtype, cut along their first dimension, and replicated over the first
    dimension of a mesh that has two. Gradients are means over all ranks.

    Args:
        network: a DiT that is not sharded yet.
        blocks: the dtype in which the parameters of the blocks and of all modulations are gathered, and so computed
            with; None: their own. Those of the two ends are gathered in their own.
        reduce: the dtype in which gradients are summed over ranks; None: that in which they are made.

    Raises ConfigError for layers in float8.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import DTensor

    if any(map(is_float8, network.modules())):
        raise ConfigError("--precision fp8: not with parameters that are sharded (--parallel fsdp, hsdp)")
    ends = MixedPrecisionPolicy(reduce_dtype=reduce, cast_forward_inputs=False)
    inside = MixedPrecisionPolicy(param_dtype=blocks, reduce_dtype=reduce, cast_forward_inputs=False)
    units = network.units()
    made: dict[nn.Module, ShardedModule] = {}
    for module in (*units, network):
        policy = ends if module is network else inside
        kind, pre_hooks, hooks = type(module), set(module._forward_pre_hooks), set(module._forward_hooks)
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        own = (frozenset(module._forward_pre_hooks) - pre_hooks, frozenset(module._forward_hooks) - hooks)
        made[module] = ShardedModule(kind, type(module), *own)
    for unit in units:
        register_fsdp_forward_method(unit, "run")
    _prefetch(network, units)
    network.sharding = Sharding(made, DTensor)


def _prefetch(network: Any, units: list[Any]) -> None:
    """Let each unit gather the next one, in forward and backward. What FSDP would gather by itself is found by the
    forwards made so far, and other forwards come between one and its backward."""
    first, block, modulation = units[0], units[-2], units[-1]
    network.set_modules_to_forward_prefetch([first])
    network.set_modules_to_backward_prefetch([modulation, block])  # nothing takes long before the last block
    for unit, following in pairwise(units):
        unit.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([unit])
    first.set_modules_to_backward_prefetch([network])  # gathered already: nothing, instead of what FSDP would choose


def in_turn(network: Any) -> Generator[Callable[..., Any]]:
    """`Unit.run` of each unit of a sharded network, which is gathered for it. To be closed."""
    if torch.is_grad_enabled():
        for unit in network.units():
            yield unit.run
        return
    # Not by FSDP's hooks: they note each forward for a backward, and without one these notes would pile up.
    with closing(gathered(network)) as units:
        for unit in units:
            yield partial(Unit.run, unit)


def gathered(network: Any) -> Generator[Any]:
    """The units of a network, sharded or not, each with whole parameters until the next is asked for. Without gradient,
    and anywhere between a forward and its backward. To be closed."""
    units = network.units()
    if network.sharding is None:
        yield from units
        return
    coming = units[0].unshard(async_op=True)
    try:
        for unit, following in zip(units, (*units[1:], None), strict=True):
            coming.wait()
            if following is not None:
                coming = following.unshard(async_op=True)
            yield unit
            unit.reshard()
    finally:
        coming.wait()  # of a pass that was cut off: the next use would find it on its way, and old
        for unit in units:
            unit.reshard()


@contextmanager
def ends_gathered(network: Any) -> Iterator[None]:
    """The parameters of the two ends of a network, sharded or not, are whole inside."""
    if network.sharding is None:
        yield
        return
    network.unshard()
    try:
        yield
    finally:
        network.reshard()


def without_parameters(pending: Pending) -> Pending:
    """A pending residual or increment with a copy of its bias: a parameter of a unit, and freed before it is used."""
    leaving: Any = pending
    return leaving if leaving.bias is None else leaving._replace(bias=leaving.bias.clone())
