"""The ranks of a run as its loop sees them. A process alone is the first of one, and agrees with itself."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ...config.schema import Config, flatten
from ...errors import ConfigError, DataError
from ...launch import Launch
from ...training.precision import resolve_device
from ...version import __version__
from .notes import Notes, of_rank
from .watch import Watch

if TYPE_CHECKING:
    from ...training.parallel import Parallel

T = TypeVar("T")

PATIENCE = timedelta(days=1)
"""How long a rank waits at most for a word of others. The watch knows earlier which of them hangs or is dead, and which
is at work for long."""
OWN = {
    *("run.run_dir", "run.device", "run.workers", "run.data_on_gpu", "data.path", "data.vae", "data.conditions"),
    *("run.reference", "run.inception", "run.dinov2"),
}
"""Settings in which ranks may differ: each machine has its own. What they lead to is compared."""


class Crew:
    """All ranks call the same methods in the same order.

    Args:
        parallel: the ranks, joined; None: this process alone.
        watch: which sees to it that none waits for one that has failed.
    """

    def __init__(self, parallel: "Parallel | None" = None, watch: Watch | None = None) -> None:
        self.parallel, self.watch = parallel, watch or Watch()
        self._agreement: Any = None
        if parallel is not None:
            from .agreement import Agreement

            self._agreement = Agreement(PATIENCE)

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

    def first_then_others(self, make: Callable[[], T], *, each_machine: bool = False) -> T:
        """What each makes, the others after the first is done: they find what it has left on the disk.

        each_machine: after the first of each machine, which has a disk of its own.
        """
        local = each_machine and self.parallel is not None and self.parallel.launch.local_rank == 0
        made = make() if self.first or local else None
        self.wait()
        return make() if made is None else made

    def check_same(self, what: str, value: str) -> None:
        """Raise DataError naming the ranks that see something else than the first."""
        found = self.all(value)
        others = [rank for rank, text in enumerate(found) if text != found[0]]
        if others:
            raise DataError(f"{what}: is not the same{self.name(others[0])} as{self.name(0)}")

    def told(self, step: int, pending: Sequence[int], fault: bool) -> tuple[int, bool]:
        """Before a step: a signal that some rank has got, 0: none has; and whether a rank cannot make the step.

        A process alone looks at its signals after the step.
        """
        if self._agreement is None:
            return 0, fault
        return self._agreement.reach(step, pending, fault)

    @property
    def notes(self) -> Notes | None:
        """Where this rank writes what it does not print; None: it prints."""
        return None if self.first or self.parallel is None else of_rank(self.parallel.rank)

    def keep_notes(self, run_dir: Path) -> None:
        """Write them into a run directory, which is there; of the first rank, the traceback of a fault."""
        if self.parallel is not None:
            of_rank(self.parallel.rank).keep_in(run_dir)

    def name(self, rank: int) -> str:
        """ " on rank 3 (gpu07)", nothing of a process alone and of no rank."""
        return "" if self.parallel is None or rank < 0 else f" on {self.parallel.name(rank)}"


ALONE = Crew()


def assemble(config: Config, launch: Launch | None, watch: Watch, epochs: int | None = None) -> tuple[Crew, Config]:
    """Join the ranks that `watch` has met; launch: None of a process alone. epochs: in place of the steps. Returns the
    configuration with the device of this rank. Raises ConfigError, also where ranks were started with different
    settings or versions."""
    if launch is None:
        return Crew(), config
    from ...training.parallel import join

    settings = {name: value for name, value in flatten(config).items() if name not in OWN}
    settings |= {"soflow-fast": __version__, "torch": torch.__version__, "--epochs": epochs}
    device = device_of(config.run.device, launch)
    config = replace(config, run=replace(config.run, device=device))
    if config.batch_size % launch.world:
        raise ConfigError(f"--batch-size {config.batch_size}: must be a multiple of the {launch.world} ranks")
    parallel = join(launch, config.run, resolve_device(device), PATIENCE, watch.store, settings)
    return Crew(parallel, watch), config


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
