"""The ranks of a run as its loop sees them. A process alone is the first of one, and agrees with itself."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch

from ..config.schema import Config
from ..errors import ConfigError, DataError
from ..launch import Launch, launched
from ..training.precision import resolve_device

if TYPE_CHECKING:
    from ..training.parallel import Parallel

T = TypeVar("T")

PATIENCE = timedelta(minutes=10)
"""How long a process waits for the others to start, and at most for a word of theirs later."""


class Crew:
    """All ranks call the same methods in the same order."""

    def __init__(self, parallel: "Parallel | None" = None) -> None:
        self.parallel = parallel

    @property
    def first(self) -> bool:
        """Whether this rank prints, logs and draws."""
        return self.parallel is None or self.parallel.rank == 0

    @property
    def size(self) -> int:
        return 1 if self.parallel is None else self.parallel.world

    @property
    def draws(self) -> bool:
        """Whether this rank takes part in drawing samples: the first, and all where each has a part of the network."""
        return self.first or (self.parallel is not None and self.parallel.sharded)

    def all(self, value: T) -> list[T]:
        """The value of each rank: numbers, texts, None and lists of them."""
        if self.parallel is None:
            return [value]
        return [json.loads(text) for text in self.parallel.texts(json.dumps(value))]

    def chosen(self, value: T) -> T:
        """The value of the first rank, on all."""
        return self.all(value)[0]

    def wait(self) -> None:
        """Until all are here."""
        self.all(None)

    def first_then_others(self, make: Callable[[], T]) -> T:
        """What each makes, the others after the first is done: they find what it has left on the disk."""
        made = make() if self.first else None
        self.wait()
        return make() if made is None else made

    def check_same(self, what: str, value: str) -> None:
        """Raise DataError naming the ranks that see something else than the first."""
        found = self.all(value)
        others = [rank for rank, text in enumerate(found) if text != found[0]]
        if others:
            raise DataError(f"{what}: is not the same{self.name(others[0])} as{self.name(0)}")

    def told(self, signal: int, fault: bool) -> tuple[int, bool]:
        """A signal that some rank got, 0: none did; and whether a rank has a fault that ends the run."""
        if self.parallel is None:
            return signal, fault
        import torch.distributed as dist

        words = torch.tensor([signal, int(fault)])
        dist.all_reduce(words, dist.ReduceOp.MAX, group=self.parallel.host_group)
        return int(words[0]), bool(words[1])

    def name(self, rank: int) -> str:
        """ " on rank 3 (gpu07)", nothing of a process alone and of no rank."""
        return "" if self.parallel is None or rank < 0 else f" on {self.parallel.name(rank)}"


ALONE = Crew()


def assemble(config: Config) -> tuple[Crew, Config]:
    """Meet the other ranks, if this process was started as one of several. Returns the configuration with the device of
    this rank. Raises ConfigError."""
    launch = launched()
    if launch is None:
        return Crew(), config
    from ..training.parallel import join

    device = device_of(config.run.device, launch)
    config = replace(config, run=replace(config.run, device=device))
    if config.batch_size % launch.world:
        raise ConfigError(f"--batch-size {config.batch_size}: must be a multiple of the {launch.world} ranks")
    return Crew(join(launch, config.run, resolve_device(device), PATIENCE)), config


def device_of(name: str, launch: Launch) -> str:
    """The device of a rank, where "auto" and "cuda" are the GPU of its own number on this machine."""
    gpu = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    if not gpu and name not in ("auto", "cpu"):
        raise ConfigError(f"--device {name}: of several ranks each takes the GPU of its own number; give cuda or cpu")
    if not gpu:
        return "cpu"
    count = torch.cuda.device_count()
    if count == 1:  # as Slurm shows each of its tasks its own
        return "cuda:0"
    if launch.local_rank >= count:
        raise ConfigError(f"--device {name}: {launch.local_world} ranks on {launch.host}, which has {count} GPUs")
    return f"cuda:{launch.local_rank}"
