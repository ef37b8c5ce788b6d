"""Who started this process: torchrun, Slurm, or nobody beside whom it would work. Imports no torch."""

import os
import re
import socket
from collections.abc import Mapping
from typing import NamedTuple

from .errors import ConfigError

PORTS = range(20_000, 30_000)
"""Among them one for each Slurm job, where no MASTER_PORT is given."""


class Launch(NamedTuple):
    """The place of this process among those of a run."""

    rank: int
    world: int
    local_rank: int
    """Among those of this machine: the number of its GPU."""
    local_world: int
    address: str
    """Where the processes meet."""
    port: int
    host: str
    """The name of this machine."""


def launched(environment: Mapping[str, str] | None = None) -> Launch | None:
    """The place that torchrun, Slurm's srun, or whoever sets RANK and WORLD_SIZE has given this process; None: it is
    the only one.

    Raises ConfigError naming a variable that does not fit.
    """
    given = os.environ if environment is None else environment
    host = socket.gethostname()
    if "RANK" in given and "WORLD_SIZE" in given:
        rank, world = _number(given, "RANK"), _number(given, "WORLD_SIZE")
        local, local_world = _number(given, "LOCAL_RANK", rank), _number(given, "LOCAL_WORLD_SIZE", world)
        address, port = given.get("MASTER_ADDR", "127.0.0.1"), _number(given, "MASTER_PORT", 29_500)
    elif _number(given, "SLURM_STEP_NUM_TASKS", 1) > 1:  # which srun sets, and a batch script does not have
        rank, world = _number(given, "SLURM_PROCID"), _number(given, "SLURM_STEP_NUM_TASKS")
        local, local_world = _number(given, "SLURM_LOCALID"), _tasks_here(given, world)
        first = _first_host(given.get("SLURM_STEP_NODELIST") or given.get("SLURM_JOB_NODELIST", "127.0.0.1"))
        address = given.get("MASTER_ADDR", first)
        port = _number(given, "MASTER_PORT", PORTS[_number(given, "SLURM_JOB_ID", 0) % len(PORTS)])
    elif "RANK" in given or _number(given, "WORLD_SIZE", 1) > 1:
        missing = "WORLD_SIZE" if "RANK" in given else "RANK"
        raise ConfigError(f"{missing}: is missing among the variables of several processes")
    else:
        return None
    if not 0 < port < 2**16:
        raise ConfigError(f"MASTER_PORT: must be in 1..65535, got {port}")
    if not 0 <= rank < world or not 0 <= local < local_world <= world:
        raise ConfigError(
            f"RANK {rank} of WORLD_SIZE {world}, LOCAL_RANK {local} of {local_world}: do not fit together"
        )
    return Launch(rank, world, local, local_world, address, port, host) if world > 1 else None


def processors() -> int:
    """How many processors this process may count as its own: of those that it may run on, its part among the ranks that
    torchrun has started here. srun gives each task its own."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, here // max(1, _number(os.environ, "LOCAL_WORLD_SIZE", 1)))


def _number(given: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = given.get(name, "" if default is None else str(default))
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ConfigError(f"{name}: must be a whole number among the variables of several processes, got {text!r:.40}")
    return int(text)


def _tasks_here(given: Mapping[str, str], world: int) -> int:
    """The tasks of this node, off "4(x2),3": nodes with four tasks, twice, then one with three."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", given.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(times or 1)
    node = _number(given, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else world


def _first_host(nodes: str) -> str:
    """The first name of a Slurm list of hosts: "gpu07" of "gpu[07-09,12],login1"."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])*", nodes)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group() if first else nodes)
