"""The kinds of errors: what the user can mend, a run that diverged, a signal. Library code raises them, and
`commands.process.run` turns them into a line on stderr and an exit code.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake of the user's: its text is one line that names the flag, field or file. Exit code 2.

    Nothing is printed where the text is empty: another process of the same command says it.
    """

    exit_code = 2


class ConfigError(UserError, ValueError):
    """A configuration value or flag that is unknown, of the wrong type or out of range."""


class DataError(UserError):
    """A data set that is missing, unreadable or not what was asked for."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or of another model."""


class StorageError(UserError):
    """A disk that is full, read-only or not permitted."""


class Diverged(Exception):
    """A loss or gradient that is not finite. Exit code 1."""

    exit_code = 1


class ElsewhereError(Exception):
    """The end of a process because another one has failed, which says why. Its exit code is this one's as well."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("another rank has failed")
        self.exit_code = exit_code


class ElsewhereOSError(OSError):
    """What the disk of another rank has refused, which tells it itself."""


class ElsewhereStorageError(StorageError):
    """An ElsewhereOSError, for the user."""


class Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP, after whatever had to be saved was saved. Exit code 130, 143 or 129.

    Raised in signal handlers, wherever the program happens to be: as with KeyboardInterrupt, no `except Exception`
    there may swallow it.
    """

    def __init__(self, signum: int, message: str = "interrupted", at_once: bool = False) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum
        self.at_once = at_once
        """Whether the process ends without waiting for threads that are still writing."""


@contextmanager
def enough_memory(advice: str) -> Iterator[None]:
    """Raise ConfigError with `advice` where memory runs out inside."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's, of a GPU
        if not known and "can't allocate memory" not in str(error):  # torch's, of the CPU
            raise
        raise ConfigError(advice) from None


@contextmanager
def storage(what: str) -> Iterator[None]:
    """Raise StorageError, which begins with `what`, where the disk refuses something inside."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, what) from None


def storage_error(error: OSError, what: str) -> StorageError:
    """`error` as a StorageError that says what was being done and to which file."""
    name = f": {error.filename}" if error.filename else ""
    kind = ElsewhereStorageError if isinstance(error, ElsewhereOSError) else StorageError
    return kind(f"{what}{name}: {error.strerror or error}")


def printable(text: str) -> str:
    """`text` with escapes for what is not printable, such as a terminal's control sequences in a file's name."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
