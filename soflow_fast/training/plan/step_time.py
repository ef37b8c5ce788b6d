"""The time of a step on many GPUs, predicted from what one GPU computes and what links carry.

A step passes over the network several times: the forward behind guidance, the student's, the consistency target, and
the backward. With fsdp and hsdp every pass gathers each block while the one before computes, so that a block takes as
long as the longer of the two; nothing hides the first gathering of a pass nor the last reduction of a backward. With
ddp gradients are reduced while the backward goes on to the next block.
"""

from dataclasses import dataclass, replace

from ...config.gpus import Gpu, Host
from ..nonfinite import PLACES
from ..time_estimate import PHASES
from .links import Group, Layout, Traffic, all_gather, all_reduce, reduce_scatter
from .memory import buckets, gathered_bytes
from .parameters import ParameterGroup, ParameterGroups
from .work import PhaseWork

HOOK_OPERATIONS = 6
"""Operations of torch on a bucket whose gradients are added up in another dtype than their own."""
HOOK_BYTES = 20
"""Bytes read and written for each gradient in it: a float32 copy, its division, and the way back."""
SUM_BYTES = 10
"""Bytes read and written to add a bf16 gradient to the float32 sum of earlier micro-batches."""
LOSS = 8 * 3
"""Bytes with which a rank tells the others one of its losses."""
EXCHANGED = 8 * (1 + len(PLACES)) + 2 * LOSS
"""Bytes with which it tells them its norm, what is not finite and both losses."""


@dataclass(frozen=True)
class PhasePlan:
    """A part of a step on many GPUs, over all micro-batches."""

    gathers: int
    """Passes that gather every parameter of the network."""
    traffic: Traffic
    compute: float
    """Seconds of the GPU, with what it copies to and from the buffers of collectives."""
    seconds: float
    """And with what links take that is not hidden behind it."""

    def __add__(self, other: "PhasePlan") -> "PhasePlan":
        return PhasePlan(
            self.gathers + other.gathers,
            self.traffic + other.traffic,
            self.compute + other.compute,
            self.seconds + other.seconds,
        )

    def times(self, n: int) -> "PhasePlan":
        """The same n times."""
        return PhasePlan(n * self.gathers, self.traffic.times(n), n * self.compute, n * self.seconds)


NOTHING = PhasePlan(0, Traffic(), 0.0, 0.0)


@dataclass(frozen=True)
class StepPlan:
    """A step on many GPUs."""

    phases: dict[str, PhasePlan]
    host: float
    """Seconds of the host, where it dispatches everything."""
    graph: bool
    """Whether the step is replayed, so that the host dispatches nothing."""

    @property
    def whole(self) -> PhasePlan:
        """All parts together, but for the host."""
        return sum(self.phases.values(), NOTHING)

    @property
    def seconds(self) -> float:
        """Of the step, which waits for whatever takes longest."""
        return self.whole.seconds if self.graph else max(self.whole.seconds, self.host)


@dataclass(frozen=True)
class Engine:
    """What is common to the passes of one step."""

    groups: ParameterGroups
    where: Layout
    low: bool
    """Whether the blocks multiply in low precision."""
    reduced: int
    """Bytes of a number as gradients are added up."""
    gpu: Gpu
    low_target: bool = True
    """Whether those of the network behind the consistency target do so too, where the student's do."""

    @property
    def depth(self) -> int:
        return len(self.groups.blocks)

    @property
    def cast(self) -> bool:
        """Whether replicas add up gradients in another dtype than that of some of them."""
        return self.low or self.reduced != 4

    def gathering(self, group: ParameterGroup) -> Traffic:
        """What gathering a group sends."""
        return all_gather(gathered_bytes(group, self.where.shards.size, self.low), self.where.shards)

    def reducing(self, group: ParameterGroup, last: bool) -> Traffic:
        """What cutting the gradients of a group sends; between replicas in the last micro-batch alone."""
        ranks = self.where.shards.size
        found = reduce_scatter(group.gathered(ranks) * self.reduced, self.where.shards)
        return found + all_reduce(sum(group.part(ranks)) * self.reduced, self.where.replicas) if last else found

    def copying(self, group: ParameterGroup, reduction: bool = False) -> float:
        """Seconds in which the part of a rank is cast into a buffer and the gathered numbers copied out of it, or
        gradients into one."""
        ranks = self.where.shards.size
        size = 2 if self.low and group.low else 4
        if reduction:
            return (group.numel * size + group.gathered(ranks) * self.reduced) / self.gpu.copy
        return (sum(group.part(ranks)) * (4 + size) + group.gathered(ranks) * 2 * size) / self.gpu.copy

    def summing(self) -> float:
        """Seconds in which whole gradients in low precision are added to those of earlier micro-batches."""
        return sum(group.numel for group in self.groups.all() if self.low and group.low) * SUM_BYTES / self.gpu.copy


def one_gpu(engine: Engine, work: dict[str, PhaseWork], parts: int, graph: bool) -> StepPlan:
    """A step of one GPU on its share alone, that exchanges nothing."""
    phases: dict[str, PhasePlan] = {}
    host = 0.0
    for name, phase in work.items():
        whole = phase.whole(engine.depth).times(1 if name == "update" else parts)
        seconds = whole.gpu + (engine.summing() * (parts - 1) if name == "backward" else 0.0)
        phases[name] = PhasePlan(0, Traffic(), seconds, seconds)
        host += whole.host
    return StepPlan(phases, host, graph)


def sharded_forward(engine: Engine, work: PhaseWork, gathers: int) -> PhasePlan:
    """A pass that needs no gradient, or the student's forward, `gathers` times over the network for `work` in all."""
    whole = work.whole(engine.depth)
    if not gathers:
        return PhasePlan(0, Traffic(), whole.gpu, whole.gpu)
    (block, *_), final, ends, _ = engine.groups
    each = work.block.gpu / gathers + engine.copying(block)
    rest = work.rest.gpu + gathers * (engine.copying(final) + engine.copying(ends))
    of_block, of_final, of_ends = (engine.gathering(group) for group in (block, final, ends))
    g = of_block.seconds(engine.gpu)
    once = of_ends.seconds(engine.gpu) + g + (engine.depth - 1) * max(each, g) + max(each, of_final.seconds(engine.gpu))
    traffic = of_block.times(engine.depth) + of_final + of_ends
    compute = gathers * engine.depth * each + rest
    return PhasePlan(gathers, traffic.times(gathers), compute, gathers * once + rest)


def sharded_backward(engine: Engine, work: PhaseWork, last: bool) -> PhasePlan:
    """The backward of a micro-batch: each block is gathered while the one after it computes, and its gradients are cut
    while the one before it does. last: of the last micro-batch."""
    (block, *_), final, ends, _ = engine.groups
    L, gpu = engine.depth, engine.gpu
    each = work.block.gpu + engine.copying(block) + engine.copying(block, reduction=True)
    rest = work.rest.gpu + sum(engine.copying(g) + engine.copying(g, reduction=True) for g in (final, ends))
    gathers = [engine.gathering(group) for group in (block, final, ends)]
    reduces = [engine.reducing(group, last) for group in (block, final, ends)]
    if L == 1:
        blocks = each
    else:
        first, middle, end = gathers[0], gathers[0] + reduces[0], reduces[0]
        blocks = max(each, first.seconds(gpu)) + (L - 2) * max(each, middle.seconds(gpu)) + max(each, end.seconds(gpu))
    bare = sum(each.seconds(gpu) for each in (*gathers, *reduces))
    traffic = (gathers[0] + reduces[0]).times(L) + sum((*gathers[1:], *reduces[1:]), Traffic())
    return PhasePlan(1, traffic, L * each + rest, blocks + bare + rest)


def replicated_backward(engine: Engine, work: PhaseWork, last: bool) -> PhasePlan:
    """The backward of a micro-batch where every rank holds everything; gradients of the last one are reduced, bucket by
    bucket, from the first block on whose gradients are there. The last bucket has nothing to hide behind."""
    whole = work.whole(engine.depth).gpu
    if not last:
        seconds = whole + engine.summing()
        return PhasePlan(0, Traffic(), seconds, seconds)
    sizes = [n for n, _ in buckets(engine.groups, engine.low)]
    each = [all_reduce(n * engine.reduced, engine.where.replicas) for n in sizes]
    seconds = [traffic.seconds(engine.gpu) for traffic in each]
    copies = sum(sizes) * HOOK_BYTES / engine.gpu.copy if engine.cast else 0.0
    alone, bare = whole + copies, max(seconds)
    first = work.block.gpu + work.rest.gpu
    return PhasePlan(0, sum(each, Traffic()), alone, max(alone, first + sum(seconds) - bare) + bare)


def many_gpus(
    engine: Engine, work: dict[str, PhaseWork], gathers: dict[str, int], parts: int, everybody: Group, graph: bool
) -> StepPlan:
    """A step of many GPUs, each with `parts` micro-batches. gathers: by `passes`."""
    sharded = engine.where.shards.size > 1
    backward = sharded_backward if sharded else replicated_backward
    engines = {"guidance": engine, "student": engine, "target": replace(engine, low=engine.low and engine.low_target)}
    phases = {
        name: sharded_forward(of_it, work[name], gathers[name] if sharded else 0).times(parts)
        for name, of_it in engines.items()
    }
    phases["backward"] = backward(engine, work["backward"], True)
    phases["backward"] += backward(engine, work["backward"], False).times(parts - 1)
    told = EXCHANGED if gathers["target"] else EXCHANGED - LOSS  # without consistency samples it has no loss of them
    phases["update"] = _update(engine, work["update"], everybody, told)
    dispatched = sum(work[name].whole(engine.depth).host * (parts if name != "update" else 1) for name in PHASES)
    passed = parts * (sum(gathers.values()) + 1)  # and one reduction
    return StepPlan(phases, dispatched + _host_of_exchanges(engine, passed), graph)


def _update(engine: Engine, work: PhaseWork, everybody: Group, told: int) -> PhasePlan:
    """The optimiser on the part of a rank, after all ranks have told each other what they need for it, `told` bytes."""
    whole, ranks = work.whole(engine.depth), engine.where.shards.size
    mine = sum(n for group in engine.groups.all() for n in group.part(ranks))
    share = mine / sum(group.numel for group in engine.groups.all())
    seconds = max(whole.gpu * share, whole.launches * engine.gpu.launch) if ranks > 1 else whole.gpu
    exchange = all_gather(told * everybody.size, everybody)
    return PhasePlan(0, exchange, seconds, seconds + exchange.seconds(engine.gpu))


def _host_of_exchanges(engine: Engine, passed: int) -> float:
    """Seconds that the host takes for what the engines do around collectives; passed: how often all groups are gathered
    or reduced."""
    host = Host()
    if engine.where.shards.size > 1:
        return passed * len(engine.groups.all()) * host.exchange
    hooked = len(buckets(engine.groups, engine.low)) if engine.cast else 0
    return hooked * HOOK_OPERATIONS * (host.dispatch + host.launch)
