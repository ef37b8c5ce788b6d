"""The parameters of a network in the groups in which FSDP2 gathers them, and how large the part of a rank is."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Size, nn

from ...models.dit import DiT


class ParameterGroup(NamedTuple):
    """Parameters that are gathered together."""

    shapes: tuple[Size, ...]
    low: bool
    """Whether a step in low precision gathers them in low precision."""

    @property
    def numel(self) -> int:
        return sum(shape.numel() for shape in self.shapes)

    def part(self, ranks: int, rank: int = 0) -> list[int]:
        """Numbers of each parameter that a rank holds: rows are dealt in equal runs, of which the last may be short or
        empty. Rank 0 holds the most, and every rank has room for as many."""
        found = []
        for shape in self.shapes:
            rows, each = shape[0], -(-shape[0] // ranks)
            found.append(max(0, min(each, rows - rank * each)) * (shape.numel() // rows))
        return found

    def gathered(self, ranks: int) -> int:
        """Numbers that are exchanged: all parts, each as large as the largest."""
        return ranks * sum(self.part(ranks))


class ParameterGroups(NamedTuple):
    """All parameters of a network."""

    blocks: tuple[ParameterGroup, ...]
    final: ParameterGroup
    """The modulation of the last norm, in the dtype of the blocks."""
    ends: ParameterGroup
    """Embedders and the last linear layer, in float32."""
    buffers: tuple[Size, ...]
    """Whole on every rank."""

    def all(self) -> tuple[ParameterGroup, ...]:
        """Every group."""
        return (*self.blocks, self.final, self.ends)


def parameter_groups(network: nn.Module) -> ParameterGroups:
    """The groups in which `models.sharding.shard` cuts a network that is not cut yet; it may lie on the meta device.

    Of a network that is never cut, all in one."""
    buffers = tuple(b.shape for b in network.buffers())
    if not isinstance(network, DiT):
        whole = ParameterGroup(tuple(p.shape for p in network.parameters()), False)
        return ParameterGroups((), ParameterGroup((), False), whole, buffers)
    low = {id(p) for layer in network.low_precision_layers() for p in layer.parameters()}
    taken: set[int] = set()

    def group(parameters: Iterable[nn.Parameter]) -> ParameterGroup:
        mine = [p for p in parameters if id(p) not in taken]
        taken.update(map(id, mine))
        (is_low,) = {id(p) in low for p in mine}
        return ParameterGroup(tuple(p.shape for p in mine), is_low)

    *blocks, final = (group(unit.parameters()) for unit in network.units())
    return ParameterGroups(tuple(blocks), final, group(network.parameters()), buffers)
