"""Files that others may have made or may use: read with limits, written for good, kept aside, locked."""

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .errors import ConfigError, storage_error

TEXT = 2**20
"""Bytes that a configuration or a list of files may have."""
LOCK = ".lock"


def read_file(path: Path, most: int, *, follow: bool = False) -> bytes:
    """The content of a regular file of at most `most` bytes.

    follow: whether `path` may itself be a link. Raises OSError: whatever is no file is not waited for, and what is
    longer is not read.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)  # the opening of a pipe waits for a writer
    try:
        handle = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP and not follow:
            raise OSError(errno.ELOOP, "is a link", str(path)) from None
        raise
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            if stat.S_ISDIR(status.st_mode):
                raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            raise OSError(errno.EINVAL, "is no regular file", str(path))
        if status.st_size > most:
            raise OSError(errno.EFBIG, f"has {status.st_size} bytes, more than {most}", str(path))
        with open(handle, "rb", closefd=False) as file:
            return file.read(status.st_size)
    except MemoryError:
        raise OSError(errno.ENOMEM, "does not fit into memory", str(path)) from None
    finally:
        os.close(handle)


def sync(path: Path) -> None:
    """Wait until a file or folder, as it is now, survives a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Make a folder and those above it that are missing, each synced into the one above it."""
    missing = [folder for folder in (path, *path.parents) if not folder.is_dir()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def write_file(path: Path, content: bytes, *, synced: bool = True) -> None:
    """Write a file so that it is there whole or as it was before; synced: a loss of power included."""
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        temporary.write_bytes(content)
        if synced:
            sync(temporary)
        os.replace(temporary, path)
        if synced:
            sync(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove(path: Path) -> None:
    """Remove a folder with what is in it; of a link, the link. Raises OSError."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def set_aside(path: Path) -> Path:
    """Rename what is not to be used any more but may be worth something to its owner. Returns its new name."""
    k, aside = 1, path.with_name(f"{path.name}.aside")
    while os.path.lexists(aside):
        k, aside = k + 1, path.with_name(f"{path.name}.aside-{k + 1}")
    os.rename(path, aside)
    return aside


@contextmanager
def sole_writer(run_dir: Path, warn: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a run directory; it goes with the process, however that ends. Reading takes no lock.

    Raises ConfigError if another process holds it, OSError if there is no writing here. Some network file systems have
    no locks: `warn` is told, and nothing is held.
    """
    with ExitStack() as held:
        # Not for writing: a file that is open so would keep its disk from being made read-only. But NFS wants it.
        for mode in (os.O_RDONLY, os.O_RDWR):
            handle = os.open(run_dir / LOCK, mode | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
            held.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                raise ConfigError(f"--run-dir {run_dir}: another process is training in it") from None
            except OSError as error:
                if error.errno == errno.EBADF and mode == os.O_RDONLY:
                    continue
                name = run_dir / LOCK
                warn(f"{name}: cannot be locked ({error.strerror}); start no second training in this directory")
        yield


def refuse_second_writer(run_dir: Path) -> None:
    """Raise ConfigError if another process holds the lock of a run directory, before costly things are begun."""
    if (run_dir / LOCK).exists():
        try:
            with sole_writer(run_dir, lambda text: None):
                pass
        except OSError as error:
            raise storage_error(error, f"--run-dir {run_dir}") from None
