"""Files that others may have made or may use: read with limits, written for good, kept aside, locked."""

import errno
import fcntl
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from .errors import ConfigError

TEXT = 2**20
"""Bytes that a configuration or a list of files may have."""
LOCK = ".lock"
"""The file in a folder that is held by the process which writes there."""


@contextmanager
def regular_file(path: Path, most: int, *, follow: bool = False) -> Iterator[BinaryIO]:
    """A regular file of at most `most` bytes, open for reading.

    follow: whether `path` may itself be a link. Raises OSError, without waiting, for a pipe, device or folder, and
    for a longer file.
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
            yield file
    finally:
        os.close(handle)


def read_file(path: Path, most: int, *, follow: bool = False) -> bytes:
    """The content of a regular file of at most `most` bytes. Raises OSError as `regular_file` does, or if it does not
    fit into memory."""
    with regular_file(path, most, follow=follow) as file:
        try:
            return file.read(os.fstat(file.fileno()).st_size)
        except MemoryError:
            raise OSError(errno.ENOMEM, "does not fit into memory", str(path)) from None


def cache_folder() -> Path:
    """The folder soflow-fast in the user's cache folder."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(folder) if os.path.isabs(folder) else Path(os.path.expanduser("~")) / ".cache"
    return home / "soflow-fast"


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
    """Write a file so that it is there whole or as it was before; with `synced` even if the power fails.

    Raises OSError that names `path`.
    """
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
    """Remove a folder with what is in it, or a file, or a link but not its target. Raises OSError."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def sha256(path: Path, most: int | None = None) -> str:
    """The SHA-256 of a file, which is not held in memory as a whole. Raises OSError.

    most: refuse what `regular_file` refuses.
    """
    digest = hashlib.sha256()
    with path.open("rb") if most is None else regular_file(path, most) as file:
        while part := file.read(2**22):
            digest.update(part)
    return digest.hexdigest()


def set_aside(path: Path) -> Path:
    """Rename a file or folder that is not used any more but may be worth something to its owner.

    Returns its new path, NAME.aside or NAME.aside-K.
    """
    k, aside = 1, path.with_name(f"{path.name}.aside")
    while os.path.lexists(aside):
        k, aside = k + 1, path.with_name(f"{path.name}.aside-{k + 1}")
    os.rename(path, aside)
    return aside


@contextmanager
def locked(folder: Path, refusal: str, warn: Callable[[str], None], *, shared: bool = False) -> Iterator[None]:
    """Hold the lock of a folder; it goes with the process, however that ends. Reading takes no lock.

    shared: beside others who do so, to see that nobody holds it alone.

    Raises ConfigError with `refusal` if another process holds it, OSError if the folder cannot be written to. Some
    network file systems have no locks: `warn` is told, and nothing is held.
    """
    with ExitStack() as held:
        # Not for writing: a file that is open so would keep its disk from being made read-only. But NFS wants it.
        for mode in (os.O_RDONLY, os.O_RDWR):
            handle = os.open(folder / LOCK, mode | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
            held.callback(os.close, handle)
            try:
                fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                held.callback(fcntl.flock, handle, fcntl.LOCK_UN)  # closing would wait for processes that are forked
                break
            except BlockingIOError:
                raise ConfigError(refusal) from None
            except OSError as error:
                if error.errno == errno.EBADF and mode == os.O_RDONLY:
                    continue
                warn(f"{folder / LOCK}: cannot be locked ({error.strerror}); let no second process write there")
        yield


class OptionalWrites:
    """Writes that may fail: `with optional(what): ...` tells `warn` of the first OSError in a row, and goes on."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn, self._refused = warn, False

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """Within it an OSError is a warning that begins with `what`."""
        try:
            yield
        except OSError as error:
            if not self._refused:
                self._warn(f"{what} not written: {error}")
            self._refused = True
        else:
            self._refused = False
