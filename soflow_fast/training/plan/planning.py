"""What a run would need on many GPUs, and how fast it would be: a prediction, of which nothing is measured."""

from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch

from ...config.gpus import GPUS
from ...config.schema import AUTO, Config, DiTConfig
from ...errors import ConfigError
from ...ranks import flow_matching_samples, micro_batches, ranks_of_a_copy
from ..consistency_target import resolve_target
from ..cuda_graph import why_not_graphed
from ..memory_estimate import USABLE, PassingMemory, as_counted, largest_that_fits
from ..state import build_flow, check_sharded
from .links import Group, Layout, layout
from .memory import REDUCED, GpuMemory, gpu_memory, passing_memory
from .parameters import parameter_groups
from .step_time import Engine, StepPlan, many_gpus, one_gpu
from .work import passes, phase_work


class Cluster(NamedTuple):
    """GPUs of one kind, equally many in each node."""

    gpu: str
    """Its name in `GPUS`."""
    gpus: int
    """Of a node."""
    nodes: int = 1

    @property
    def ranks(self) -> int:
        return self.gpus * self.nodes


@dataclass(frozen=True)
class Plan:
    """What is predicted of a step on a cluster."""

    config: Config
    """The configuration, `micro_batch` and `run.recompute` resolved."""
    cluster: Cluster
    where: Layout
    precision: str
    parameters: int
    micro_batches: int
    memory: GpuMemory
    """Of the GPU that holds the most."""
    step: StepPlan
    alone: StepPlan
    """Of one GPU that computes its share of the batch alone, whether it fits its memory or not."""

    @property
    def share(self) -> int:
        """Images of a GPU in a step."""
        return self.config.batch_size // self.cluster.ranks

    @property
    def fits(self) -> bool:
        return self.memory.peak <= USABLE * GPUS[self.cluster.gpu].memory

    @property
    def images_per_second(self) -> float:
        return self.config.batch_size / self.step.seconds

    @property
    def efficiency(self) -> float:
        """Images a second, by those of so many GPUs that would each compute its share alone."""
        return self.alone.seconds / self.step.seconds


def plan(config: Config, cluster: Cluster) -> Plan:
    """The prediction for `config` on a cluster, in seconds and without a GPU.

    `micro_batch` auto is the largest with which a step is predicted to fit, `run.recompute` auto keeps everything for
    the backward where that fits. float8 is counted as bf16, compiled blocks as plain ones. Raises ConfigError naming a
    field or flag that does not fit.
    """
    run, ranks = config.run, cluster.ranks
    if ranks < 2:
        raise ConfigError("--gpus 1: a single GPU exchanges nothing; --dry-run --gpu NAME predicts it")
    if not isinstance(config.model, DiTConfig):
        raise ConfigError(f"--gpus: predicts a step of a DiT, the network is a {config.model.words.partition(' ')[0]}")
    if config.batch_size % ranks:
        raise ConfigError(f"--batch-size {config.batch_size}: must be a multiple of the {ranks} GPUs")
    where = layout(run.parallel, cluster.gpus, cluster.nodes, run.shard_ranks)
    sharded = where.shards.size > 1
    if sharded and run.cuda_graph:
        raise ConfigError(f"--cuda-graph: a step of --parallel {run.parallel} cannot be recorded")
    if "fp8" in (config.precision, config.guidance_precision) and "fp8" not in GPUS[cluster.gpu].products:
        raise ConfigError(f"--gpu {cluster.gpu}: has no float8 products; give another --precision")
    share = share_of(config, ranks)
    precision = as_counted(share).precision
    low = precision == "bf16"
    groups = parameter_groups(build_flow(config).network)

    @cache
    def memory(micro_batch: int, recompute: str) -> GpuMemory:
        tried = replace(share, micro_batch=micro_batch, run=replace(run, recompute=recompute))
        return gpu_memory(tried, groups, where, low, passing_in(tried, sharded))

    usable = USABLE * GPUS[cluster.gpu].memory
    micro_batch, recompute = share.micro_batch, run.recompute
    assumed = "none" if recompute == "auto" else recompute
    if micro_batch == AUTO:
        micro_batch = largest_that_fits(share.batch_size, usable, lambda size: memory(size, assumed).peak)
    if recompute == "auto":
        recompute = "nothing" if memory(micro_batch, "nothing").peak <= usable else "none"
    share = replace(share, micro_batch=micro_batch, run=replace(run, recompute=recompute))
    resolved = replace(config, micro_batch=micro_batch, run=share.run)
    if sharded:
        check_sharded(resolved, config.precision, ranks)
    parts = micro_batches(share.batch_size, micro_batch)
    size = -(-share.batch_size // parts)

    target = resolve_target(as_counted(share), precision, torch.device("cuda"))
    work = phase_work(share, cluster.gpu, size)
    low_target = target.teacher == "student" or target.rounds_weights
    engine = Engine(groups, where, low, REDUCED[run.reduce_dtype], GPUS[cluster.gpu], low_target)
    graphed = run.cuda_graph
    if graphed is None:
        graphed = why_not_graphed(config, config.precision, torch.device("cuda")) is None
    return Plan(
        resolved,
        cluster,
        where,
        precision,
        sum(group.numel for group in groups.all()),
        parts,
        memory(micro_batch, recompute),
        many_gpus(
            engine,
            work,
            passes(share, target, precision, size),
            parts,
            Group(cluster.gpus, cluster.nodes),
            run.cuda_graph is True,
        ),
        one_gpu(engine, work, parts, graphed),
    )


def share_of(config: Config, ranks: int) -> Config:
    """The configuration with the batch of one of so many ranks, of that with the most consistency samples: the others
    wait for it."""
    batch, objective = config.batch_size // ranks, config.objective
    fewest = flow_matching_samples(config.batch_size, objective.flow_matching_fraction) // ranks
    return replace(config, batch_size=batch, objective=replace(objective, fm_fraction=fewest / batch))


def passing_in(share: Config, sharded: bool) -> PassingMemory:
    """What comes and goes in a step on a rank. Where parameters are cut, no gradient stays whole from one micro-batch
    to the next: it is that of a step of one micro-batch."""
    if sharded and 0 < share.micro_batch < share.batch_size:
        parts = micro_batches(share.batch_size, share.micro_batch)
        share = replace(share, batch_size=-(-share.batch_size // parts), micro_batch=0)
    return passing_memory(share)


def peak_of_rank(share: Config, gpus: int, nodes: int) -> int:
    """Bytes in use at the peak of a step, predicted, on one of `nodes` nodes of `gpus` GPUs.

    share: the configuration with the batch of one rank. Raises ConfigError naming a field that does not fit.
    """
    groups = parameter_groups(build_flow(share).network)
    ranks = gpus * nodes
    cut = ranks_of_a_copy(share.run.parallel, share.run.shard_ranks, ranks, gpus)
    where = Layout(Group(cut, 1), Group(ranks // cut, 1))  # which of them share a node is no matter here
    low = as_counted(share).precision == "bf16"
    return gpu_memory(share, groups, where, low, passing_in(share, cut > 1)).peak
