"""Batches read ahead, in processes of their own where samples must be decoded."""

import multiprocessing
import multiprocessing.context
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import count, islice
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
import torch.multiprocessing  # by which tensors come back in shared memory
from torch import Tensor

from ...config.schema import AUTO
from ...data import Dataset, Source
from ...errors import DataError, Interrupted
from ...launch import processors
from .. import signals

MOST_WORKERS = 8
"""For each device that is to be kept busy."""
QUICK = 2**28
"""Bytes of a data set whose pages are taken to stay in memory."""
AHEAD = 2
"""Batches under way for each process."""

Item = TypeVar("Item")
Result = TypeVar("Result")

_read: Callable[[Any], Any]
"""That of a process that reads."""


def workers_for(dataset: Dataset, workers: int = AUTO, devices: int = 1) -> int:
    """How many processes read ahead; AUTO: as many as there are processors of this rank beside this one, at most eight
    for each device, and none for a small set that is copied from memory."""
    if workers != AUTO:
        return workers
    quick = dataset.copies and dataset.nbytes() <= QUICK
    return 0 if quick else max(1, min(MOST_WORKERS * devices, processors() - 1))


class _Forks(multiprocessing.context.ForkContext):
    """Forks that are known: those of a pool that has lost one are told to end, and would take their time
    (`signals.serve`)."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[Any] = []

    def Process(self, *given: Any, **named: Any) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        self._made.append(multiprocessing.context.ForkProcess(*given, **named))
        return self._made[-1]

    def kill(self) -> None:
        for process in self._made:
            process.kill()


class Ahead(Generic[Item, Result]):
    """`read` of one item after the other, which processes do ahead of the one who asks. They begin with the first.

    read: is called in processes that are forked from this one. lost: the text of the error where one was killed, or
    has no shared memory for a result.

    A process that is killed is found when its result is asked for. torch's DataLoader would raise from a signal
    handler, in the midst of a step.
    """

    def __init__(self, read: Callable[[Item], Result], workers: int, lost: str) -> None:
        self.workers = workers
        self._read, self._lost = read, lost
        self._pool: ProcessPoolExecutor | None = None
        self._forks = _Forks()

    def results(self, items: Iterable[Item]) -> Iterator[Result]:
        """`read(item)` of each, in order; AHEAD items for each process are under way. Raises DataError."""
        if not self.workers:
            yield from map(self._read, items)
            return
        coming, ahead = iter(items), deque[Future[Result]]()
        try:
            while True:
                self._submit(islice(coming, AHEAD * self.workers - len(ahead)), ahead)
                if not ahead:
                    return
                yield ahead.popleft().result()
        except RuntimeError as error:  # a pool that is broken, or torch's
            if not isinstance(error, BrokenProcessPool) and "shared memory" not in str(error):
                raise
            if isinstance(error, BrokenProcessPool):
                self._forks.kill()
            raise DataError(self._lost) from None
        finally:
            for future in ahead:
                future.cancel()

    def _submit(self, items: Iterable[Item], ahead: deque[Future[Result]]) -> None:
        if self._pool is None:
            # The index of a large set is shared with a process that is forked, and sent to any other.
            self._forks = _Forks()
            self._pool = ProcessPoolExecutor(self.workers, self._forks, _begin_worker, (self._read, os.getpid()))
        with warnings.catch_warnings():  # from Python 3.12 on, of threads; those of torch do not run in the fork
            warnings.simplefilter("ignore", DeprecationWarning)
            ahead.extend(self._pool.submit(_work, item) for item in items)

    def close(self, wait: bool = True) -> None:
        """End the processes. wait: until each is done with the item that it reads."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=wait, cancel_futures=True)

    def __enter__(self) -> "Ahead[Item, Result]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(wait=not (isinstance(error, Interrupted) and error.at_once))


class Reader:
    """`Source.raw` of one step after the other for one rank, read ahead by `workers_for` processes.

    A step that does not follow the last one is read anew from there.
    """

    def __init__(self, source: Source, rank: int = 0, world: int = 1, workers: int = AUTO) -> None:
        self.workers = workers_for(source.dataset, workers)
        lost = (
            f"--data {source.place}: a process that reads it was killed, or lacks memory or room in /dev/shm; "
            "give fewer with --set run.workers=1"
        )
        self._ahead = Ahead(partial(source.raw, rank=rank, world=world), self.workers, lost)
        self._next = -1
        self._results: Iterator[tuple[Tensor, Tensor]] = iter(())

    def read(self, step: int) -> tuple[Tensor, Tensor]:
        """The samples of a step as they are read, and their labels. Raises DataError."""
        if step != self._next:
            self._results = self._ahead.results(count(step))
        self._next = -1  # an error ends the results
        found = next(self._results)
        self._next = step + 1
        return found

    def close(self) -> None:
        """End the processes."""
        self._next = -1
        self._ahead.close()


def _begin_worker(read: Callable[[Any], Any], parent: int) -> None:
    global _read
    _read = read
    signals.serve(parent)
    torch.set_num_threads(1)


def _work(item: Any) -> Any:
    return _read(item)
