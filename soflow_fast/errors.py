"""What the user did wrong, and the one place that turns it into a line on stderr and an exit code.

Library code raises; only `run`, which every command line goes through, exits.
"""

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn, TextIO


class UserError(Exception):
    """A mistake of the user's: its text is one line that names the flag, field or file. Exit code 2."""

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


class Interrupted(BaseException):
    """SIGINT or SIGTERM, after whatever had to be saved was saved. Exit code 130 or 143.

    Raised in signal handlers, wherever the program happens to be: as with KeyboardInterrupt, no `except Exception`
    there may swallow it.
    """

    def __init__(self, signum: int, message: str = "interrupted", at_once: bool = False) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum
        self.at_once = at_once
        """Whether threads that are still writing are not to be waited for."""


_received: list[int] = []


def received() -> list[int]:
    """The signals that have come since `run` began: an exception raised by one is lost where Python cannot raise, as in
    a destructor or in a callback of C code."""
    return list(_received)


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


_STORAGE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
}


def storage_error(error: OSError, what: str) -> StorageError:
    """`error` as a `StorageError` that says what was being done and to which file."""
    name = f": {error.filename}" if error.filename else ""
    return StorageError(f"{what}{name}: {error.strerror or error}")


def run(main: Callable[[], None]) -> NoReturn:
    """Call `main` and exit: 0, 2 for the user's mistakes (one line on stderr), 130 and 143 after SIGINT and SIGTERM.

    Exit code 2 goes before 130 and 143: it says that a signal came but that the state could not be saved. A second
    signal exits at once.
    """
    at_once = ending = False

    def stopped(signum: int, frame: object) -> None:
        _received.append(signum)
        if ending or len(_received) > 1:  # an exception now would leave through the handler of the first one
            os._exit(128 + signum)
        raise Interrupted(signum)

    _received.clear()
    for number in (signal.SIGTERM, signal.SIGINT):  # from the first moment, so that even start-up ends with 143 or 130
        signal.signal(number, stopped)
    try:
        try:
            main()
            sys.stdout.flush()
        finally:
            ending = True
        code = 128 + _received[0] if _received else 0
    except (UserError, Diverged) as error:
        code = error.exit_code
        _say(f"error: {error}")
    except Interrupted as error:
        code, at_once = error.exit_code, error.at_once
        _say(str(error))
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
        _say("interrupted")
    except BrokenPipeError:  # the reader of our output went away, as in `... | head`
        _drop(sys.stdout)
        code = 0
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _STORAGE:
            code = UserError.exit_code
            _say(f"error: {storage_error(error, 'cannot read or write')}")
        elif _received:  # an import that was cut short has made an error of its own of the signal
            code = 128 + _received[0]
            _say("interrupted")
        else:
            raise
    for number in (signal.SIGTERM, signal.SIGINT):  # nothing is left to be saved
        signal.signal(number, lambda *_: os._exit(code))
    try:
        sys.stdout.flush()
    except OSError:  # output to a full disk: Python would try again at exit, and complain
        _drop(sys.stdout)
    if (
        at_once
    ):  # Python would end a thread in the midst of foreign code, and with it the process otherwise than by `code`
        os._exit(code)
    sys.exit(code)


def _drop(stream: TextIO) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _say(line: str) -> None:
    line = " ".join(line.split())  # what is left may hold a file's name, whose control characters a terminal obeys
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    try:
        print("soflow: " + line, file=sys.stderr, flush=True)
    except OSError:  # to a full disk: the exit code still says it, and at exit Python would put another in its place
        _drop(sys.stderr)
