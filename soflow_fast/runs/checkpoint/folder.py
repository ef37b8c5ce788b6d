"""Where checkpoints lie, and directories that appear whole or not at all."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ...files import make_folder, remove, sha256, sync

MANIFEST = "manifest.json"


def directory(run_dir: Path) -> Path:
    """The folder of a run's checkpoints."""
    return run_dir / "checkpoints"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    found = directory(run_dir).glob("step-" + "[0-9]" * 8)
    return sorted((folder for folder in found if folder.is_dir()), reverse=True)


@contextmanager
def whole_directory(
    final: Path, proceed: Callable[[], None] = lambda: None, pass_over: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """A temporary directory that becomes `final`, with a manifest, if the block ends well, and else goes.

    proceed: is called between the parts; an error that it raises ends the writing as one in the block does.
    pass_over: see `commit`.
    """
    temporary = begin(final)
    try:
        yield temporary
        digests: dict[str, str] = {}
        for file in sorted(temporary.iterdir()):
            proceed()
            digests[file.name] = sha256(file)
        commit(temporary, final, digests, list(digests), proceed, pass_over)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def begin(final: Path) -> Path:
    """An empty directory beside `final`, whose name says that it is not whole."""
    make_folder(final.parent)
    temporary = final.parent / f".partial-{final.name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    return temporary


def commit(
    temporary: Path,
    final: Path,
    digests: Mapping[str, str],
    unsynced: Iterable[str],
    proceed: Callable[[], None],
    pass_over: Callable[[], None] = lambda: None,
) -> None:
    """Write the manifest, SHA-256 by file name, sync it and the files that are `unsynced`, and rename.

    pass_over: is called before that, to move away what lies at `final`.
    """
    (temporary / MANIFEST).write_text(json.dumps({"sha256": dict(sorted(digests.items()))}, indent=2) + "\n")
    for name in [*unsynced, MANIFEST]:
        proceed()
        sync(temporary / name)
    sync(temporary)
    proceed()
    pass_over()
    os.rename(temporary, final)
    sync(final.parent)


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint so that a kill on the way leaves no part of it under its name. Raises OSError."""
    aside = folder.with_name(f".partial-{folder.name}-removed-{os.getpid()}")
    remove(aside)
    os.rename(folder, aside)
    remove(aside)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors in host memory to a new file. Raises OSError."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path)
        path.chmod(mode)  # it makes a file that its owner alone can read
    except SafetensorError as error:  # it reports a full disk in its own words
        raise OSError(getattr(error, "errno", None) or 5, str(error), str(path)) from None
