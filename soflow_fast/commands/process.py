"""The process of a command line: its signals, its output and its exit code. Only this module exits."""

import errno
import io
import os
import stat
import sys
from collections.abc import Callable
from typing import NoReturn, TextIO

from ..errors import ConfigError, Diverged, Interrupted, UserError, printable, storage_error
from ..launch import launched
from ..runs import signals

STORAGE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
}
"""Errors of files and disks that the user can mend; any other OSError is a fault of the program."""


def run(main: Callable[[], None]) -> NoReturn:
    """Call `main` and exit: 0, 1 if training diverged, 2 for the user's mistakes, 128 + its number after a signal.

    An error is one line on stderr. Exit code 2 takes precedence over a signal's: it says that a signal came but that
    the state could not be saved. A second signal exits at once.
    """
    at_once = begun = ending = False

    def stop(signum: int) -> None:
        if ending or len(signals.received()) > 1:  # an exception now would leave through the handler of the first one
            os._exit(128 + signum)
        if begun:  # else nobody would catch it yet
            raise Interrupted(signum)

    signals.forget()
    signals.watch(stop)  # from the first moment, so that even start-up ends with 143, 130 or 129
    _open_streams()
    try:
        try:
            begun = True
            if signals.received():
                raise Interrupted(signals.received()[0])
            main()
            _flush()
        finally:
            ending = True
        code = _code_of_signal() or 0
    except (UserError, Diverged) as error:
        code = error.exit_code
        if str(error):
            _say(f"error: {error}")
    except Interrupted as error:
        code, at_once = error.exit_code, error.at_once
        _say(str(error))
    except KeyboardInterrupt:  # somebody has put Python's own handler of SIGINT back
        code = 130
        _say("interrupted")
    except BrokenPipeError:  # the reader of our output went away, as in `... | head`
        _drop(sys.stdout)
        code = 0
    except Exception as error:
        if isinstance(error, OSError) and error.errno in STORAGE:
            code = UserError.exit_code
            _say(f"error: {storage_error(error, 'cannot read or write')}")
        elif signals.received():  # an import that was cut short has made an error of its own of the signal
            code = _code_of_signal()
            _say("interrupted")
        else:
            raise
    signals.watch(lambda _: os._exit(code))  # nothing is left to be saved
    try:
        sys.stdout.flush()
    except OSError:  # output to a full disk: Python would try again at exit, and complain
        _drop(sys.stdout)
    if at_once:
        # At a usual exit Python would end a thread in the midst of foreign code, and the exit code would be another.
        os._exit(code)
    sys.exit(code)


def alone(command: str) -> None:
    """Raise ConfigError in each of several processes that torchrun or srun has started: a text in the first alone."""
    place = launched()
    if place is not None:
        text = f"{command} takes every GPU of a machine by itself: start one process, not {place.world}"
        raise ConfigError(f"{text} by torchrun or srun" if place.rank == 0 else "")


def _code_of_signal() -> int:
    """The exit code of the first signal that came; 0 without one."""
    return next((128 + number for number in signals.received()), 0)


def _open_streams() -> None:
    """Open /dev/null in the place of standard streams that were closed, as by `>&-`.

    The next file that is opened would otherwise take such a stream's number, and all that C code prints. Characters
    that the encoding of the output lacks are printed as escapes.
    """
    handle = 0
    while handle <= 2:
        handle = os.open(os.devnull, os.O_RDWR)
    os.close(handle)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # for as long as the process lives
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _flush() -> None:
    """Print what is still in Python's buffer. Raises OSError, except for a terminal that was closed."""
    try:
        sys.stdout.flush()
    except OSError as error:
        if error.errno != errno.EIO or not stat.S_ISCHR(os.fstat(sys.stdout.fileno()).st_mode):
            raise
        _drop(sys.stdout)


def _drop(stream: TextIO) -> None:
    """Send what a stream prints from now on nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _say(line: str) -> None:
    """Print one line on stderr."""
    try:
        print("soflow: " + printable(" ".join(line.split())), file=sys.stderr, flush=True)
    except OSError:  # to a full disk: the exit code still says it, and at exit Python would put another in its place
        _drop(sys.stderr)
