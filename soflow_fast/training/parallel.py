"""Several processes that train one run, by PyTorch's own engines: DistributedDataParallel, or FSDP2's `fully_shard`.

Imported by runs of several ranks alone, as these engines take seconds to import.

Every process is a rank with a device of its own. What a sample is belongs to its place in the whole batch
(`soflow_fast.ranks`), each rank's loss is the mean over its share, and gradients are the mean over ranks: that is the
gradient of one process on the whole batch.
"""

import inspect
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ..config.schema import Config, Parallelism, RunConfig
from ..errors import ConfigError
from ..flow import SolutionFlow
from ..launch import Launch
from ..models.dit import DiT
from ..models.sharding import shard
from ..ranks import flow_matching_samples, micro_batches, ranks_of_a_copy, share_of_first

BUCKET_MB = 25
"""Gradients that are reduced together, as torch chooses."""
# Their name in torch 2.13, and before.
_SYNCS_BUFFERS = "forward_sync_buffers"
if _SYNCS_BUFFERS not in inspect.signature(DistributedDataParallel).parameters:
    _SYNCS_BUFFERS = "broadcast_buffers"


@dataclass(frozen=True)
class Parallel:
    """The ranks of a run, joined. `kind` is "ddp", "fsdp" or "hsdp"."""

    kind: Parallelism
    launch: Launch
    device: torch.device
    mesh: DeviceMesh
    """The ranks on their devices: ("shard",) with fsdp, ("replicate", "shard") with hsdp, ("replicate",) with ddp."""
    host_mesh: DeviceMesh
    """The same ranks for tensors in host memory, by gloo: checkpoints, and words between them."""
    hosts: tuple[str, ...]
    """The machine of each rank."""
    store: dist.Store
    """torch's Store that all ranks see, for what must not wait for a collective."""

    @property
    def rank(self) -> int:
        return self.launch.rank

    @property
    def world(self) -> int:
        return self.launch.world

    @property
    def sharded(self) -> bool:
        """Whether parameters, averages and moments are DTensors, of which each rank holds a part."""
        return self.kind != "ddp"

    @property
    def replicas(self) -> int:
        """How many ranks hold the same part of the state."""
        return 1 if self.kind == "fsdp" else self.mesh.size(0)

    def rows(self, values: Tensor) -> Tensor:
        """What each rank gives, [n] of one dtype and size, as [world, n] on all of them."""
        out = values.new_empty(self.world * len(values))
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # of torch 2.13, and before
        gather(out, values.contiguous())
        return out.view(self.world, -1)

    def texts(self, text: str) -> list[str]:
        """What each rank says."""
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, text, group=self.host_group)
        return found

    def local_parts(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What this rank holds of tensors, empty parts left out."""
        parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
        return [part for part in parts if part.numel()] or parts[:1]

    @property
    def host_group(self) -> Any:
        """The group of all ranks for tensors in host memory."""
        return dist.group.WORLD  # of both backends

    def name(self, rank: int) -> str:
        """ "rank 3 (gpu07)"."""
        return f"rank {rank} ({self.hosts[rank]})"


def meet(launch: Launch, patience: Any = None) -> dist.Store:
    """The Store that all ranks see, once all have come. patience: a timedelta; None: torch's.

    Raises ConfigError if they do not come. A signal ends the wait: the main thread would not hear it in torch's code,
    so another one waits there.
    """
    found: list[dist.Store | Exception] = []
    waiting = threading.Thread(target=lambda: found.append(_rendezvous(launch, patience)), daemon=True)
    waiting.start()
    waiting.join()
    if isinstance(found[0], (RuntimeError, ValueError)):  # as torch's errors of networks and stores are
        raise _cannot_join(launch, found[0]) from None
    if isinstance(found[0], Exception):
        raise found[0]
    # torchrun may keep one store over all its attempts.
    return dist.PrefixStore("attempt-" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), found[0])


def _rendezvous(launch: Launch, patience: Any) -> dist.Store | Exception:
    where = f"tcp://{launch.address}:{launch.port}?rank={launch.rank}&world_size={launch.world}"
    try:
        return next(dist.rendezvous(where, **_waits(patience)))[0]
    except Exception as error:  # for the thread that waits
        return error


def _waits(patience: Any) -> dict[str, Any]:
    return {} if patience is None else {"timeout": patience}


def _cannot_join(launch: Launch, error: Exception) -> ConfigError:
    reason, where = str(error).strip().splitlines()[0], f"{launch.address}:{launch.port}"
    return ConfigError(f"rank {launch.rank} ({launch.host}) cannot join the others at {where}: {reason}")


def join(
    launch: Launch,
    run: RunConfig,
    device: torch.device,
    patience: Any = None,
    store: dist.Store | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Parallel:
    """Meet the other ranks, or go on from the store at which they have met (`meet`). patience: a timedelta for which
    one waits for the others to start and, later, for an exchange; None: torch's. settings: must be those of all ranks.

    Raises ConfigError if they do not come, if their settings differ, if two have the same GPU, or if the mesh does not
    fit them.
    """
    shards = ranks_of_a_copy(run.parallel, run.shard_ranks, launch.world, launch.local_world)
    if launch.world % shards:
        raise ConfigError(f"--parallel hsdp: the state is cut over {shards} ranks, {launch.world} are no multiple")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = meet(launch, patience) if store is None else store
    rank, world, backend = launch.rank, launch.world, "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    ranks = dist.PrefixStore("ranks", store)
    try:
        dist.init_process_group(backend, store=ranks, rank=rank, world_size=world, **_waits(patience))
    except (RuntimeError, ValueError) as error:
        raise _cannot_join(launch, error) from None
    places: list[Any] = [None] * world
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else f"{rank}"
    dist.all_gather_object(places, ((launch.host, launch.local_world), gpu, dict(settings or {})))
    gpus, given = [gpu for _, gpu, _ in places], [values for _, _, values in places]
    places = [place for place, _, _ in places]
    for other, values in enumerate(given):
        for name, value in values.items():
            if given[0].get(name) != value:
                where = f"rank {other} ({places[other][0]})"
                raise ConfigError(f"{where} was started with another {name} than rank 0: {value}, {given[0].get(name)}")
    if len(set(gpus)) < world:
        shared = next(place[0] for place, gpu in zip(places, gpus, strict=True) if gpus.count(gpu) > 1)
        raise ConfigError(f"--device {device.type}: there are more ranks than GPUs on {shared}")
    if run.parallel == "hsdp" and not run.shard_ranks and len({here for _, here in places}) > 1:
        counts = ", ".join(f"{here} on {host}" for host, here in dict(places).items())
        raise ConfigError(f"--parallel hsdp: nodes have unequal numbers of ranks ({counts}); give run.shard_ranks")
    shape = {"ddp": (world,), "fsdp": (world,), "hsdp": (world // shards, shards)}[run.parallel]
    names = {"ddp": ("replicate",), "fsdp": ("shard",), "hsdp": ("replicate", "shard")}[run.parallel]
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    host_mesh = mesh if device.type == "cpu" else init_device_mesh("cpu", shape, mesh_dim_names=names)
    return Parallel(run.parallel, launch, device, mesh, host_mesh, tuple(host for host, _ in places), store)


class Replicated:
    """A network that every rank holds whole. Its gradients are averaged by DistributedDataParallel, bucket by bucket
    while the backward of the last micro-batch runs.

    Gradients in low precision are added up over micro-batches and over ranks in float32 (`run.reduce_dtype`) and
    rounded once at the end.
    """

    sums_itself = True
    """Over micro-batches: gradients are in the dtype of their parameters."""

    def __init__(
        self, parallel: Parallel, network: DiT, reduce_dtype: torch.dtype, micro_batches: int, graphed: bool = False
    ) -> None:
        """graphed: the step is to be recorded on `stream`, to which the engine's part of the backward then belongs."""
        self.parallel, self.reduce_dtype = parallel, reduce_dtype
        self.stream: Any = torch.cuda.Stream(parallel.device) if graphed else None
        engine: Any = DistributedDataParallel
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            self.module = engine(
                network,
                process_group=parallel.mesh.get_group("replicate"),
                bucket_cap_mb=BUCKET_MB,
                **{_SYNCS_BUFFERS: False},
                gradient_as_bucket_view=True,
                # A static graph counts the gradients of its first backward, and takes every micro-batch for that one.
                static_graph=micro_batches == 1,
            )
        self._low = [p for p in network.parameters() if p.dtype.itemsize < 4]
        self._sums: dict[Tensor, Tensor] = {}
        """Of the gradients in low precision of micro-batches that are done, float32."""
        self._quiet: Any = None
        if self._low or reduce_dtype != torch.float32:
            self.module.register_comm_hook(None, self._reduce)

    def begin(self, *, last: bool) -> None:
        """Before the forward of a micro-batch: the gradients of all but the last stay on this rank."""
        self.end()
        if not last:
            self._quiet = self.module.no_sync()
            self._quiet.__enter__()

    def end(self) -> None:
        """After the backward of a micro-batch."""
        if self._quiet is None:
            return
        self._speak()
        for p in self._low:
            if p.grad is not None:
                self._sums[p] = self._sums[p] + p.grad if p in self._sums else p.grad.float()
                p.grad = None

    def forget(self) -> None:
        """Drop what a step that failed has left."""
        self._speak()
        self._sums.clear()

    def _speak(self) -> None:
        """Let the next backward exchange gradients again."""
        if self._quiet is not None:
            self._quiet.__exit__(None, None, None)
            self._quiet = None

    def _reduce(self, _: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        flat = bucket.buffer()
        mine = flat.to(torch.float32, copy=True)
        start = 0
        for p in bucket.parameters():
            if p in self._sums:
                mine[start : start + p.numel()] += self._sums.pop(p).flatten()
            start += p.numel()
        mine = mine.div_(self.parallel.world).to(self.reduce_dtype)
        work: Any = dist.all_reduce(mine, group=self.parallel.mesh.get_group("replicate"), async_op=True)
        return work.get_future().then(lambda done: flat.copy_(done.value()[0]))


class Sharded:
    """A network of whose parameters every rank holds a part, float32. FSDP2 gathers them block by block, in the dtype
    of the products, and gives each rank its part of the averaged gradients, of every micro-batch."""

    sums_itself = False
    stream = None

    def __init__(self, parallel: Parallel, network: DiT) -> None:
        self.module: Any = network
        self._replicas = parallel.replicas

    def begin(self, *, last: bool) -> None:
        """Before the forward of a micro-batch: between replicas gradients are added up once, in the last."""
        if self._replicas > 1:
            self.module.set_requires_all_reduce(last)

    def end(self) -> None:
        """After the backward of the last micro-batch."""

    def forget(self) -> None:
        """Drop what a step that failed has left."""


Engine = Replicated | Sharded


def sharded_flow(
    parallel: Parallel, flow: SolutionFlow, blocks: torch.dtype | None, reduce: torch.dtype
) -> SolutionFlow:
    """A flow on the meta device as one of which this rank holds its part, on its device, still to be filled.

    blocks: the dtype in which the blocks are gathered; None: float32.
    """
    assert isinstance(flow.network, DiT)
    shard(flow.network, parallel.mesh, blocks=blocks, reduce=reduce)
    flow.to_empty(device=parallel.device)
    return flow


@torch.no_grad()
def fill(flow: SolutionFlow, weights: Mapping[str, Tensor]) -> None:
    """Set parameters and buffers to these, whole ones or parts, without a word between the ranks."""
    for name, value in flow.state_dict().items():
        given = weights[name].to(value.device, value.dtype)
        value.copy_(given if isinstance(given, DTensor) else placed_like(value, given))


@contextmanager
def whole(parameter: Tensor) -> Iterator[Tensor]:
    """In host memory, all of a parameter of which this rank holds a part; it takes its part of what is written there.

    All ranks draw the same numbers, and none ever holds more than one parameter whole.
    """
    if not isinstance(parameter, DTensor):
        yield parameter
        return
    everything = torch.empty(parameter.shape, dtype=parameter.dtype)
    yield everything
    parameter.copy_(placed_like(parameter, everything.to(parameter.device)))


def placed_like(like: Tensor, whole: Tensor) -> Tensor:
    """This rank's part of a tensor that all ranks hold whole, where `like` is one of parts; else the tensor."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def check_shares(config: Config, world: int) -> None:
    """Raise ConfigError if some forward of sharded ranks would have consistency samples on some ranks and on others
    none: these would make one pass of the network less than those."""
    B = config.batch_size // world
    parts = micro_batches(B, config.micro_batch)
    first = flow_matching_samples(config.batch_size, config.objective.flow_matching_fraction)
    shares = {share_of_first(config.batch_size, first, rank, world) for rank in range(world)}
    sizes = [B * (k + 1) // parts - B * k // parts for k in range(parts)]
    if any(len({share_of_first(B, n_fm, k, parts) < size for n_fm in shares}) > 1 for k, size in enumerate(sizes)):
        raise ConfigError(
            f"--parallel {config.run.parallel}: with {-(-B // parts)} images in a forward some ranks would have no "
            "consistency sample and others one; give a larger --batch-size or --micro-batch"
        )
