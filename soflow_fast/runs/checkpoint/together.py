"""Work that all ranks of a run do before any of them goes on, and whose errors all of them learn of."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch.distributed as dist

from ...errors import CheckpointError, Diverged, ElsewhereError, ElsewhereOSError
from .reading import LaterFormat

if TYPE_CHECKING:
    from ...training.parallel import Parallel

T = TypeVar("T")

ALIKE: tuple[type[Exception], ...] = (CheckpointError, LaterFormat, Diverged)
"""Errors that are the same on whichever rank they are met."""


class _Fault(NamedTuple):
    """An error as other ranks are told of it."""

    kind: str
    text: str
    number: int | None
    """Of an OSError, or the exit code."""
    file: str | None


def together(parallel: "Parallel | None", work: Callable[[], T], group: Any = None) -> list[T]:
    """What `work` returns on each rank, small things that can be pickled; on all of them, once all are done.

    group: the process group that is asked; None: that of all ranks. parallel: None for the only process.

    An error that it raises on one rank ends it on all: a CheckpointError or Diverged is raised by all alike, an
    OSError or what interrupts a save by the others as an ElsewhereOSError that names the rank. Of anything else the
    others raise ElsewhereError.
    """
    if parallel is None:
        return [work()]
    own: BaseException | None = None
    given: tuple[_Fault | None, Any] = (None, None)
    try:
        given = (None, work())
    except BaseException as error:
        own, given = error, (_fault(error), None)
    found: list[Any] = [None] * parallel.world
    dist.all_gather_object(found, given, group=parallel.host_group if group is None else group)
    faults = {rank: fault for rank, (fault, _) in enumerate(found) if fault is not None}
    if not faults:
        return [value for _, value in found]
    # The same rank's on all of them: one that has met damage must not try the next checkpoint while another ends.
    rank = min(faults, key=lambda rank: (_LEAST_FIRST.index(faults[rank].kind), rank))
    if own is not None and rank == parallel.rank:
        raise own
    raise _told(faults[rank], parallel.name(rank)) from None


_LEAST_FIRST = ["other", "Diverged", "LaterFormat", "OSError", "interrupted", "CheckpointError"]


def _fault(error: BaseException) -> _Fault:
    for kind in reversed(ALIKE):
        if isinstance(error, kind):
            return _Fault(kind.__name__, str(error), None, None)
    if isinstance(error, OSError):
        file = None if error.filename is None else str(error.filename)
        return _Fault("OSError", error.strerror or str(error), error.errno, file)
    if not isinstance(error, Exception):
        return _Fault("interrupted", "interrupted", None, None)
    return _Fault("other", "", getattr(error, "exit_code", 1), None)


def _told(fault: _Fault, name: str) -> Exception:
    for kind in ALIKE:
        if kind.__name__ == fault.kind:
            return kind(fault.text)
    if fault.kind == "other":
        return ElsewhereError(fault.number or 1)
    text = f"{name}: {fault.text}"
    return ElsewhereOSError(text) if fault.number is None else ElsewhereOSError(fault.number, text, fault.file)
