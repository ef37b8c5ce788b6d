"""The process of a command line: its signals, its output and its exit code. Only this module exits."""

import errno
import io
import os
import signal
import stat
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import NoReturn, TextIO

from ..errors import ConfigError, Diverged, ElsewhereError, Interrupted, UserError, printable, storage_error
from ..launch import Launch, launched
from ..runs import signals
from ..runs.ranks import watch
from ..runs.ranks.failure import described, kind_of, named
from ..runs.ranks.notes import of_rank

_held = _alone = False
STORAGE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
}
"""Errors of files and disks that the user can mend; any other OSError is a fault of the program."""


def run(main: Callable[[], None]) -> NoReturn:
    """Call `main` and exit: 0, 1 if training diverged, 2 for the user's mistakes, 128 + its number after a signal.

    An error is one line on stderr. Exit code 2 takes precedence over a signal's: it says that a signal came but that
    the state could not be saved. A second signal exits at once. Of several ranks one prints the line, and all end with
    the code of the first error (`runs.ranks.watch`).
    """
    at_once = begun = ending = False
    place: Launch | None = None
    fault: BaseException | None = None
    line = kept = ""

    def stop(signum: int) -> None:
        if ending and place:  # torchrun ends the others where one has ended; its line and code are on their way
            return
        if ending or len(signals.received()) > 1:  # an exception now would leave through the handler of the first one
            os._exit(128 + signum)
        if begun and not (_held and place):  # else nobody would catch it yet
            raise Interrupted(signum)

    global _alone
    _alone = False
    signals.forget()
    signals.watch(stop)  # from the first moment, so that even start-up ends with 143, 130 or 129
    _open_streams()
    watch.ends_with(None)
    stderr = sys.stderr
    speak: Callable[[], None] = lambda: None  # noqa: E731
    try:
        try:
            begun = True
            if signals.received():
                raise Interrupted(signals.received()[0])
            with suppress(ConfigError):  # told by what needs to know: --help does not
                place = launched()
            if place:
                speak = _become_rank(place)
            main()
            _flush()
        finally:
            ending = True
        code = _code_of_signal() or 0
    except (UserError, Diverged, ElsewhereError) as error:
        code, line, fault = error.exit_code, str(error), error
    except Interrupted as error:
        code, at_once, line, fault = error.exit_code, error.at_once, str(error), error
    except KeyboardInterrupt:  # somebody has put Python's own handler of SIGINT back
        code, line, fault = 130, "interrupted", Interrupted(signal.SIGINT)
    except BrokenPipeError as error:  # the reader of our output went away, as in `... | head`
        _drop(sys.stdout)
        code, fault = 0, error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in STORAGE:
            fault = storage_error(error, "cannot read or write")
            code, line = fault.exit_code, str(fault)
        elif signals.received():  # an import that was cut short has made an error of its own of the signal
            code, line, fault = _code_of_signal(), "interrupted", Interrupted(signals.received()[0])
        elif place:
            code, line, fault = 1, described(error), error
            if kind_of(error) == "error":
                notes = of_rank(place.rank)
                notes.note("".join(traceback.format_exception(error)))
                kept = notes.kept_apart()
        else:
            raise
    if fault and place:
        line = _said_of_many(place, fault, line, code, kept)
        at_once = at_once or isinstance(fault, Interrupted)  # a thread may still wait for the others to come
    elif fault and not isinstance(fault, Interrupted) and line:
        line = f"error: {line}"
    if line:
        _say(line, stderr)
    signals.watch(lambda _: os._exit(code))  # nothing is left to be saved
    try:
        sys.stdout.flush()
    except OSError:  # output to a full disk: Python would try again at exit, and complain
        _drop(sys.stdout)
    speak()
    signals.expect_echoes(False)
    if at_once:
        # At a usual exit Python would end a thread in the midst of foreign code, and the exit code would be another.
        os._exit(code)
    sys.exit(code)


@contextmanager
def held() -> Iterator[None]:
    """Let a signal that comes to one of several ranks inside act at the end: a torch that is half imported could not
    tell the others."""
    global _held
    _held = True
    try:
        yield
    finally:
        _held = False
    if signals.received():
        raise Interrupted(signals.received()[0])


def alone(command: str, why: str = "takes every GPU of a machine by itself") -> None:
    """Raise ConfigError in each of several processes that torchrun or srun has started: a text in the first alone."""
    global _alone
    _alone = True
    place = launched()
    if place is not None:
        text = f"{command} {why}: start one process, not {place.world}"
        raise ConfigError(f"{text} by torchrun or srun" if place.rank == 0 else "")


def _become_rank(place: Launch) -> Callable[[], None]:
    """Be one of several ranks, of which only rank 0 prints, until the function that is returned is called. The logs of
    torch's C++ code, of connections that others have closed, are left out of stderr."""
    signals.expect_echoes()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    stdout, stderr = sys.stdout, sys.stderr
    watch.ends_with(partial(_end, stderr), lambda line: _say(line, stderr))
    if place.rank == 0:
        return lambda: None
    plain, silent = os.dup(1), open(os.devnull, "w")  # noqa: SIM115  # for as long as the process lives
    os.dup2(silent.fileno(), 1)  # gloo of torch 2.10 prints each connection
    setattr(sys, "stdout", silent)  # noqa: B010
    setattr(sys, "stderr", of_rank(place.rank))  # noqa: B010

    def speak() -> None:
        os.dup2(plain, 1)
        os.close(plain)
        silent.close()
        setattr(sys, "stdout", stdout)  # noqa: B010
        setattr(sys, "stderr", stderr)  # noqa: B010

    return speak


def _end(stderr: TextIO, line: str, code: int, told: Callable[[], None]) -> NoReturn:
    """End the process from any thread, without waiting for another."""
    try:
        if line:
            _say(line, stderr)
        told()
    finally:
        os._exit(code)


def _said_of_many(place: Launch, error: BaseException, text: str, code: int, kept: str) -> str:
    """End all ranks for an error of this one, which does not return, before they have left each other.

    After that, and of commands whose processes do not meet, returns the line that this rank prints.
    """
    ranks = watch.current()
    early = ranks is None and not _alone and bool(text) and not isinstance(error, ElsewhereError)
    if early or (ranks and ranks.running):
        signals.ignore()
        with suppress(OSError):
            sys.stdout.flush()
    if ranks and ranks.running:
        ranks.failed(error, text, code, kept)
    if early:
        watch.failed_early(place, error, text, code, kept)
    if not text or isinstance(error, ElsewhereError):
        return ""
    if isinstance(error, Interrupted):
        return "" if place.rank else text
    text += f"; its traceback is in {kept}" if kept else ""
    if place.rank == 0:
        return f"error: {text}"
    line = named(text, place.rank, place.host)
    own = line == text or not isinstance(error, UserError)
    return f"error: {line}" if own or ranks or place.local_rank == 0 else ""


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
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:
            setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115  # for as long as the process lives
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


def _say(line: str, stream: TextIO) -> None:
    """Print one line."""
    try:
        print("soflow: " + printable(" ".join(line.split())), file=stream, flush=True)
    except OSError:  # to a full disk: the exit code still says it, and at exit Python would put another in its place
        _drop(stream)
