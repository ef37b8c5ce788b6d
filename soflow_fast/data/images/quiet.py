"""Silence of the libraries that decode images: what is wrong with one is said by the error that they raise."""

import contextlib
import ctypes
import functools
import logging
import threading
import warnings
from typing import Any

from PIL import _imaging


class _Quiet(contextlib.ContextDecorator):
    """Within it no warning of a decoder reaches anybody, be it Python's, logged or printed by libtiff.

    The first thread in silences them for all, the last one out ends it.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._ends = threading.Lock(), 0, contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._ends.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
                log = logging.getLogger("PIL")
                self._ends.callback(log.setLevel, log.level)
                log.setLevel(logging.CRITICAL + 1)
                if (handler := _handler_of_libtiff()) is not None:
                    self._ends.callback(handler, handler(None))
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._ends.close()


@functools.cache
def _handler_of_libtiff() -> Any:
    """Sets who is told of errors, of the libtiff that Pillow is linked with, and returns who was; None: not found.

    Its own handler writes to the process's stderr, and Pillow reports the errors anyway.
    """
    try:
        handler = ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler
    except (OSError, AttributeError):
        return None
    handler.argtypes, handler.restype = [ctypes.c_void_p], ctypes.c_void_p
    return handler


quiet = _Quiet()
