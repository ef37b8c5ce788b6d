"""The memory that a GPU of many needs for a step, predicted.

What lasts is counted tensor by tensor; what comes and goes is that of the step of one GPU on its share of the batch
(`memory_estimate.estimate_passing`), and what the engines hold on top follows from how they work. Left out beside what
a single GPU's prediction leaves out: NCCL's buffers, and the check of the quotient.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import lru_cache

from ...config.schema import Config, DiTConfig
from ...ranks import micro_batches
from ..memory_estimate import BLOCK, PassingMemory, estimate_passing
from .links import Layout
from .parameters import ParameterGroup, ParameterGroups

DEPTHS = (6, 8)
"""A step's memory with so many blocks tells that with more. With fewer the peak may be in a part of the step to which
blocks add less."""
BUCKET = 25 * 2**20
"""Bytes of gradients that DistributedDataParallel reduces together."""
REDUCED = {"fp32": 4, "bf16": 2}
"""Bytes of a number, by the precision in which gradients are added up."""


@dataclass(frozen=True)
class GpuMemory:
    """Bytes in use on one GPU at the peak of a step, by purpose; they add up to `peak`."""

    weights: int
    """As the forward multiplies them, and buffers; with fsdp and hsdp this GPU's part in float32, its own masters."""
    masters: int
    moments: int
    """And how many steps each parameter has made."""
    averages: int
    gathered: int
    """The copy of two blocks and of the two ends that is there while they are used, with fsdp and hsdp."""
    gradients: int
    activations: int
    workspace: int

    @property
    def peak(self) -> int:
        return sum(self.parts().values())

    @property
    def state(self) -> int:
        """What lasts from step to step."""
        return self.weights + self.masters + self.moments + self.averages

    def parts(self) -> dict[str, int]:
        """The bytes of each part of the peak, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def passing_memory(config: Config) -> PassingMemory:
    """What comes and goes in a step that does not check the quotient, in seconds whatever its depth."""
    config = alone(config)
    if not isinstance(config.model, DiTConfig) or config.model.depth <= DEPTHS[1]:
        return _estimated(config)
    depth, (a, b) = config.model.depth, DEPTHS
    found = [_estimated(replace(config, model=replace(config.model, depth=d))) for d in DEPTHS]
    values = [[getattr(each, field.name) for each in found] for field in fields(PassingMemory)]
    return PassingMemory(*(of_b + (depth - b) * (of_b - of_a) // (b - a) for of_a, of_b in values))


def alone(config: Config) -> Config:
    """The same step of one GPU: equal for all ways to exchange what many need of each other."""
    return replace(
        config, run=replace(config.run, parallel="ddp", shard_ranks=0, reduce_dtype="fp32", check_quotient_every=0)
    )


_estimated = lru_cache(maxsize=16)(estimate_passing)


def gpu_memory(config: Config, groups: ParameterGroups, where: Layout, low: bool, passing: PassingMemory) -> GpuMemory:
    """The memory of the fullest GPU. config: of its own share of the batch. low: whether blocks multiply in bf16.

    passing: of a step of this share on one GPU.
    """
    averages = 1 if config.objective.teacher == "student" else 2
    parts = micro_batches(config.batch_size, config.micro_batch)
    buffers = _stored((shape.numel() for shape in groups.buffers), 4)
    if where.shards.size == 1:
        return _replicated(config, groups, averages, parts, low, buffers, passing)
    return _sharded(config, groups, where.shards.size, averages, parts, low, buffers, passing)


def _replicated(
    config: Config,
    groups: ParameterGroups,
    averages: int,
    parts: int,
    low: bool,
    buffers: int,
    passing: PassingMemory,
) -> GpuMemory:
    """Everything whole. Gradients are views of buckets that stay; those in low precision are added up over
    micro-batches beside them, and over ranks in copies of a bucket, of which one is reduced while the next is made."""
    rounded, full = _by_dtype(groups, low)
    whole = rounded + full
    copies = 0
    if rounded or config.run.reduce_dtype != "fp32":
        copies = 2 * max(n for n, _ in buckets(groups, low)) * REDUCED[config.run.reduce_dtype]
    held = _stored(rounded, 2) + _stored(full, 4)
    sums = _stored(rounded, 4) if parts > 1 else 0
    state = {
        "weights": _stored(rounded, 2) + _stored(full, 4) + buffers,
        "masters": _stored(rounded, 4),
        **_of_optimizer(whole, averages, buffers),
        "gathered": 0,
    }
    if config.optim.ema_precision == "fp64":
        state["averages"] += _stored(whole, 8)
    before = GpuMemory(
        **state, gradients=held + sums + copies, activations=passing.activations, workspace=passing.workspace
    )
    update = GpuMemory(**state, gradients=held, activations=0, workspace=passing.update)
    return max(before, update, key=lambda memory: memory.peak)


def _sharded(
    config: Config,
    groups: ParameterGroups,
    shards: int,
    averages: int,
    parts: int,
    low: bool,
    buffers: int,
    passing: PassingMemory,
) -> GpuMemory:
    """Parts of float32. In a backward two blocks are gathered, this one and the next; this one's gradients are there in
    the dtype of its copy, and those of the one before in that of the reduction, until they are cut as well."""
    mine = [n for group in groups.all() for n in group.part(shards)]
    block = max(groups.blocks, key=lambda group: group.numel)
    two = min(2, len(groups.blocks))
    gathered = two * gathered_bytes(block, shards, low)
    gathered += sum(gathered_bytes(group, shards, low) for group in (groups.final, groups.ends))
    in_flight = gathered_bytes(block, 1, low) + block.gathered(shards) * REDUCED[config.run.reduce_dtype]
    state = {
        "weights": _stored(mine, 4) + buffers,
        "masters": 0,
        **_of_optimizer(mine, averages, buffers),
    }
    cut = _stored(mine, 4)
    earlier = cut if parts > 1 else 0
    moments = (
        GpuMemory(
            **state,
            gathered=gathered,
            gradients=in_flight + earlier,
            activations=passing.activations,
            workspace=passing.workspace,
        ),
        GpuMemory(**state, gathered=gathered, gradients=in_flight + cut, activations=0, workspace=passing.workspace),
        GpuMemory(**state, gathered=0, gradients=cut, activations=0, workspace=-(-passing.update // shards)),
    )
    return max(moments, key=lambda memory: memory.peak)


def gathered_bytes(group: ParameterGroup, ranks: int, low: bool) -> int:
    """Bytes of a group as it is gathered."""
    return group.gathered(ranks) * (2 if low and group.low else 4)


def buckets(groups: ParameterGroups, low: bool) -> list[tuple[int, int]]:
    """The buckets of DistributedDataParallel as numbers and bytes of each number: gradients of one dtype, the last
    parameter first. A bucket is closed by the parameter that fills it."""
    found: list[tuple[int, int]] = []
    open_now = {2: 0, 4: 0}
    for group in reversed(groups.all()):
        size = 2 if low and group.low else 4
        for shape in reversed(group.shapes):
            open_now[size] += shape.numel()
            if open_now[size] * size >= BUCKET:
                found.append((open_now[size], size))
                open_now[size] = 0
    return found + [(n, size) for size, n in open_now.items() if n]


def _by_dtype(groups: ParameterGroups, low: bool) -> tuple[list[int], list[int]]:
    """The numbers of each parameter in low precision, and of each in float32."""
    rounded = [n for group in groups.all() if low and group.low for n in group.part(1)]
    return rounded, [n for group in groups.all() if not (low and group.low) for n in group.part(1)]


def _of_optimizer(held: list[int], averages: int, buffers: int) -> dict[str, int]:
    """The float32 moments and averages of tensors with so many numbers, and their counts of steps."""
    stored = _stored(held, 4)
    return {"moments": 2 * stored + BLOCK * len(held), "averages": averages * (stored + buffers)}


def _stored(numbers: Iterable[int], size: int) -> int:
    """Bytes of tensors with so many numbers each, as the allocator rounds them up."""
    return sum(-(-n * size // BLOCK) * BLOCK for n in numbers)
