"""The directory of a run: whose it is, who may write to it, and what a start finds and leaves in it.

config.json       the configuration, every "auto" replaced
data.json         which data it learns from
code.json         with which versions, and from which commit
left-out.txt      the samples that --skip-bad left out, one a line
checkpoints/      see checkpoint/
metrics.jsonl     see metrics.py; tensorboard/ has the same
tracking.json     the id of the run in each tracker; wandb/ is what that package keeps
samples/          grids of samples
evaluation.json   the figures of the finished run
warnings-rank-00003.txt   what that rank would have printed, if there was anything
.lock             held by the process that trains
"""

import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.schema import Config, disagreement, from_json, to_json
from ..data import identity
from ..data.identity import Identity
from ..errors import ConfigError, DataError, storage, storage_error
from ..files import LOCK, TEXT, locked, make_folder, read_file, set_aside, write_file
from . import source_code
from .checkpoint.together import together

if TYPE_CHECKING:
    from ..training.parallel import Parallel

DATA = "data.json"
LEFT_OUT = "left-out.txt"
STALE = ".*.partial-*"
"""The names of files that a process which was killed has left half written."""
LOOKS, PAUSE = 20, 0.25
"""How often a rank looks for a file on a network's disk, and the seconds between."""


def check(run_dir: Path, config: Config) -> None:
    """Raise ConfigError if `run_dir` holds another run or something else, or if another process trains in it.

    Writes nothing. Raises StorageError if the directory cannot be read.
    """
    with storage("--run-dir"):
        _check_content(run_dir, config)
        if (run_dir / LOCK).exists():
            # Shared: all ranks of a run check at the same time.
            with storage(f"--run-dir {run_dir}"), lock(run_dir, lambda text: None, shared=True):
                pass


@contextmanager
def taken(run_dir: Path, config: Config, warn: Callable[[str], None]) -> Iterator[None]:
    """Make the directory if need be, and be the only process that trains in it. Raises as `check` does."""
    with ExitStack() as held:
        with storage(f"--run-dir {run_dir}"):
            make_folder(run_dir)
            held.enter_context(lock(run_dir, warn))
        with storage("--run-dir"):  # another process may have made it since it was checked
            _check_content(run_dir, config)
        yield


def check_shared(run_dir: Path, parallel: "Parallel") -> None:
    """Raise ConfigError, on all ranks, if some do not see what the first one writes in `run_dir`, which exists there.

    All ranks call it at the same time. Raises StorageError if the disk refuses a file of one of them.
    """

    def write() -> str:
        path = run_dir / f".shared.partial-{secrets.token_hex(8)}"  # a name for which no client of NFS has looked
        path.touch()
        return path.name

    with storage(f"--run-dir {run_dir}"):
        names = together(parallel, write)
    try:
        seen = together(parallel, lambda: _is_seen(run_dir / names[0]))
    finally:
        with suppress(OSError):
            (run_dir / names[parallel.rank]).unlink()
    if not all(seen):
        raise ConfigError(
            f"--run-dir {run_dir}: {parallel.name(seen.index(False))} does not see what {parallel.name(0)} writes "
            "there; give a directory on a file system that all hosts share"
        )


def _is_seen(path: Path) -> bool:
    for _ in range(LOOKS):
        if path.exists():
            return True
        time.sleep(PAUSE)
    return False


def check_data(run_dir: Path, found: Identity) -> None:
    """Raise DataError if the run in `run_dir` learns from other data, saying what differs."""
    try:
        old = identity.from_json(read_file(run_dir / DATA, identity.MOST_BYTES))
    except (OSError, ValueError):  # none yet, or damaged: the checkpoints hold it too
        return
    if changed := identity.changes(old, found):
        raise DataError(
            f"--data: is other data than the run in {run_dir} learns from ({'; '.join(changed)}); "
            "give the same data or another --run-dir"
        )


def prepare(
    run_dir: Path, config: Config, data: str, resumed: bool, warn: Callable[[str], None], bad: Sequence[str] = ()
) -> None:
    """Write config.json, data.json, code.json and left-out.txt and make what the training writes to.

    Raises StorageError.

    bad: what is wrong with each sample that is left out. Removes partial files of a start that was killed. A log
    without a checkpoint to go on from is set aside.
    """
    with storage(f"--run-dir {run_dir}"):
        write_file(run_dir / "config.json", to_json(config).encode())
        write_file(run_dir / DATA, data.encode())
        code = json.dumps(source_code.versions(), indent=2) + "\n"
        write_file(run_dir / source_code.CODE, code.encode(), synced=False)
        if bad:
            write_file(run_dir / LEFT_OUT, "".join(f"{text}\n" for text in bad).encode("utf-8", "backslashreplace"))
        else:
            (run_dir / LEFT_OUT).unlink(missing_ok=True)
        (run_dir / "samples").mkdir(exist_ok=True)
        for stale in run_dir.rglob(STALE):
            if stale.is_file():
                stale.unlink()
        log = run_dir / "metrics.jsonl"
        if not resumed and os.path.lexists(log) and log.stat().st_size:
            kept = set_aside(log)
            warn(f"{log} has lines but there is no checkpoint: from step 0 again; kept as {kept.name}")


def lock(run_dir: Path, warn: Callable[[str], None], *, shared: bool = False) -> AbstractContextManager[None]:
    """Hold the lock of a run directory, as `files.locked` does."""
    return locked(run_dir, f"--run-dir {run_dir}: another process is training in it", warn, shared=shared)


def configuration(run_dir: Path) -> Config | None:
    """The configuration of the run in a directory; None: there is none that can be read."""
    try:
        return from_json(read_file(run_dir / "config.json", TEXT).decode())
    except (OSError, ValueError):  # told when it is checked
        return None


def _check_content(run_dir: Path, config: Config) -> None:
    """Raise ConfigError if `run_dir` holds another run or something else."""
    known = run_dir / "config.json"
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"--run-dir {run_dir}: is a file")
    if not known.exists():
        if run_dir.exists() and any(path.name != LOCK and not path.match(STALE) for path in run_dir.iterdir()):
            raise ConfigError(f"--run-dir {run_dir}: neither empty nor a run (it has no config.json)")
        return
    try:
        text = read_file(known, TEXT).decode()
        if not text.strip("\0 \n"):  # a loss of power: the checkpoints hold the configuration too, and it is compared
            return
        old = from_json(text)
    except OSError as error:
        raise storage_error(error, "cannot read the run's configuration") from None
    except ValueError as error:
        raise ConfigError(f"{known}: {error}") from None
    finished = (run_dir / "checkpoints" / f"step-{old.steps:08d}").is_dir()
    changed = disagreement(old, config, finished=finished)
    if changed:
        raise ConfigError(
            f"--run-dir {run_dir}: holds a run with another configuration ({'; '.join(changed)}); "
            "give another --run-dir or the same configuration"
        )
