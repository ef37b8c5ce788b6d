"""What a collective sends over which links, and how long that takes: the rings and trees of NCCL, as formulas.

Ranks are numbered node by node, and every GPU has a network adapter of its own. NCCL lays one ring for each adapter, so
that each adapter carries its share of what leaves a node. The numbers of hops are those by which NCCL itself estimates
its algorithms (src/graph/tuning.cc).
"""

import math
from dataclasses import astuple, dataclass
from typing import NamedTuple

from ...config.gpus import Gpu
from ...config.schema import Parallelism
from ...errors import ConfigError


class Group(NamedTuple):
    """Ranks that exchange data: `local` of them on each of `nodes` nodes."""

    local: int
    nodes: int

    @property
    def size(self) -> int:
        return self.local * self.nodes


ALONE = Group(1, 1)


class Layout(NamedTuple):
    """Who exchanges what in a run."""

    shards: Group
    """Ranks over which one copy of the state is cut."""
    replicas: Group
    """Ranks that hold the same part of it."""


def layout(kind: Parallelism, gpus: int, nodes: int, shard_ranks: int = 0) -> Layout:
    """The groups of a rank among `nodes` nodes of `gpus` GPUs. shard_ranks: with hsdp; 0: the GPUs of a node.

    Raises ConfigError if the ranks cannot be cut so, or if a group would lie unevenly over nodes.
    """
    everybody = Group(gpus, nodes)
    if kind == "ddp":
        return Layout(ALONE, everybody)
    if kind == "fsdp":
        return Layout(everybody, ALONE)
    shards, ranks = shard_ranks or gpus, gpus * nodes
    if shards == 1:
        raise ConfigError("--parallel hsdp: nothing is cut over one rank; give run.shard_ranks, or --parallel ddp")
    if ranks % shards:
        raise ConfigError(f"--parallel hsdp: the state is cut over {shards} ranks, {ranks} are no multiple")
    if gpus % shards == 0:
        return Layout(Group(shards, 1), Group(gpus // shards, nodes))
    if shards % gpus == 0:
        return Layout(Group(gpus, shards // gpus), Group(1, ranks // shards))
    raise ConfigError(
        f"run.shard_ranks must divide the {gpus} GPUs of a node or be a multiple of them to be predicted, got {shards}"
    )


@dataclass(frozen=True)
class Traffic:
    """What one GPU sends, and receives as much of, in some collectives."""

    nvlink: float = 0.0
    """Bytes to others of its node."""
    network: float = 0.0
    """Bytes to other nodes."""
    calls: int = 0
    nvlink_hops: int = 0
    """One after the other, until the last rank has everything."""
    network_hops: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def times(self, n: int) -> "Traffic":
        """The same n times."""
        return Traffic(*(n * value for value in astuple(self)))

    def seconds(self, gpu: Gpu) -> float:
        """Both kinds of links carry their bytes at the same time; calls and hops come one after the other."""
        waiting = self.calls * gpu.collective + self.nvlink_hops * gpu.nvlink_hop + self.network_hops * gpu.network_hop
        return max(self.nvlink / gpu.nvlink, self.network / gpu.network) + waiting


def all_gather(size: float, group: Group) -> Traffic:
    """A ring over all ranks: `size` bytes of which each has an N-th, so that each sends S (N - 1) / N.

    Of the N links of a ring one in `local` leaves a node.
    """
    n = group.size
    if n == 1:
        return Traffic()
    sent = size * (n - 1) / n
    network = sent / group.local if group.nodes > 1 else 0.0
    return Traffic(sent - network, network, 1, n - group.nodes, group.nodes - 1)


def reduce_scatter(size: float, group: Group) -> Traffic:
    """The same ring with sums: `size` bytes on each rank, of whose sum each gets an N-th."""
    return all_gather(size, group)


def all_reduce(size: float, group: Group) -> Traffic:
    """Within each node a reduce-scatter and in the end an all-gather, 2 S (g - 1) / g; between them each GPU adds up
    its S / g with those of its kind on k nodes, 2 S / g (k - 1) / k, by double trees (Sanders, Speck & Traeff 2009).

    On one node that is the ring's 2 S (N - 1) / N.
    """
    g, k = group
    if group.size == 1:
        return Traffic()
    return Traffic(2 * size * (g - 1) / g, 2 * size / g * (k - 1) / k, 1, 2 * (g - 1), 2 * math.ceil(math.log2(k)))
