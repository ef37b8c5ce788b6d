"""Which samples of a batch a rank takes.

What a sample is, with its noise, times and loss, belongs to its place in the whole batch, so that a run is the same on
any number of ranks. Places are dealt so that each rank has its share of both losses: the first places of a batch take
the flow-matching loss, and rank r of W takes the r-th part of them and the r-th part of the others.
"""

import math

import torch
from torch import Tensor


def flow_matching_samples(batch_size: int, fraction: float) -> int:
    """How many samples of a whole batch take the flow-matching loss: its first ones."""
    return math.floor(fraction * batch_size + 0.5)


def micro_batches(size: int, micro_batch: int) -> int:
    """How many micro-batches of at most `micro_batch` a rank's share of `size` is cut into; one where that is not
    above 0."""
    return -(-size // micro_batch) if micro_batch > 0 else 1


def ranks_of_a_copy(parallel: str, shard_ranks: int, world: int, here: int) -> int:
    """Over how many of `world` ranks one copy of the state is cut; `here` are those of a node."""
    return {"ddp": 1, "fsdp": world, "hsdp": shard_ranks or here}[parallel]


def share(size: int, first: int, part: int, parts: int) -> Tensor:
    """The places in a batch of `size` that part `part` of `parts` takes, int64 [size / parts], rounded either way.

    first: how many places are dealt before the others are. A part has its share of them in front. Over all parts
    every place comes once.
    """
    start, stop, a, b = _bounds(size, first, part, parts)
    return torch.cat([torch.arange(a, b), torch.arange(first + start - a, first + stop - b)])


def share_of_first(size: int, first: int, part: int, parts: int) -> int:
    """How many of the `first` places are in a part."""
    _, _, a, b = _bounds(size, first, part, parts)
    return b - a


def _bounds(size: int, first: int, part: int, parts: int) -> tuple[int, int, int, int]:
    """Where a part begins and ends in a batch, and in the first places of it."""
    start, stop = size * part // parts, size * (part + 1) // parts
    return start, stop, first * start // size, first * stop // size
