"""Several processes that train one run, by PyTorch's own engines: DistributedDataParallel, or FSDP2's `fully_shard`.

Every process is a rank with a device of its own. What a sample is belongs to its place in the whole batch
(`soflow_fast.ranks`), each rank's loss is the mean over its share, and gradients are the mean over ranks: that is the
gradient of one process on the whole batch.
"""

import os
import threading
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..config.schema import Parallelism, RunConfig
from ..errors import ConfigError
from .launch import Launch

PATIENCE = timedelta(minutes=10)
"""How long a process waits for the others to start."""


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
        return self.mesh["replicate"].size() if "replicate" in (self.mesh.mesh_dim_names or ()) else 1

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

    @property
    def host_group(self) -> Any:
        """The group of all ranks for tensors in host memory."""
        return dist.group.WORLD  # of both backends

    def name(self, rank: int) -> str:
        """ "rank 3 (gpu07)"."""
        return f"rank {rank} ({self.hosts[rank]})"


def meet(launch: Launch) -> dist.Store:
    """The Store that all ranks see, once all have come. Raises ConfigError if they do not.

    A signal ends the wait: the main thread would not hear it in torch's code, so another one waits there.
    """
    found: list[dist.Store | Exception] = []
    waiting = threading.Thread(target=lambda: found.append(_rendezvous(launch)), daemon=True)
    waiting.start()
    waiting.join()
    if isinstance(found[0], Exception):
        raise _cannot_join(launch, found[0]) from None
    # torchrun may keep one store over all its attempts.
    return dist.PrefixStore("attempt-" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), found[0])


def _rendezvous(launch: Launch) -> dist.Store | Exception:
    where = f"tcp://{launch.address}:{launch.port}?rank={launch.rank}&world_size={launch.world}"
    try:
        return next(dist.rendezvous(where, timeout=PATIENCE))[0]
    except (RuntimeError, ValueError) as error:  # torch's errors of networks and stores are RuntimeErrors
        return error


def _cannot_join(launch: Launch, error: Exception) -> ConfigError:
    reason, where = str(error).strip().splitlines()[0], f"{launch.address}:{launch.port}"
    return ConfigError(f"rank {launch.rank} ({launch.host}) cannot join the others at {where}: {reason}")


def join(launch: Launch, run: RunConfig, device: torch.device, store: dist.Store | None = None) -> Parallel:
    """Meet the other ranks, or go on from the store at which they met (`meet`).

    Raises ConfigError if they do not come, or if the mesh does not fit them.
    """
    shards = {"ddp": 1, "fsdp": launch.world, "hsdp": run.shard_ranks or launch.local_world}[run.parallel]
    if launch.world % shards:
        raise ConfigError(f"--parallel hsdp: the state is cut over {shards} ranks, {launch.world} are no multiple")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, world = store or meet(launch), launch.world
    try:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=dist.PrefixStore("ranks", store), rank=launch.rank, world_size=world, timeout=PATIENCE
        )
    except (RuntimeError, ValueError) as error:
        raise _cannot_join(launch, error) from None
    shape = {"ddp": (world,), "fsdp": (world,), "hsdp": (world // shards, shards)}[run.parallel]
    names = {"ddp": ("replicate",), "fsdp": ("shard",), "hsdp": ("replicate", "shard")}[run.parallel]
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    host_mesh = mesh if device.type == "cpu" else init_device_mesh("cpu", shape, mesh_dim_names=names)
    hosts: list[Any] = [None] * world
    dist.all_gather_object(hosts, launch.host)
    return Parallel(run.parallel, launch, device, mesh, host_mesh, tuple(hosts), store)
