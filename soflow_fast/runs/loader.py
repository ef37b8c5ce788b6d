"""Batches read ahead, in processes of their own where samples must be decoded."""

import multiprocessing
import os
import warnings
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch
import torch.multiprocessing  # by which tensors come back in shared memory
from torch import Tensor

from ..config.schema import AUTO
from ..data import Source
from ..errors import DataError
from . import signals

MOST_WORKERS = 8
QUICK = 2**28
"""Bytes of a data set whose pages are taken to stay in memory."""
AHEAD = 2
"""Batches under way for each process."""

_source: Source
"""That of a process that reads."""


class Reader:
    """`Source.raw` of one step after the other for one rank.

    workers: processes that read ahead; 0: none, AUTO: as many as there are processors beside this one, at most eight,
    and none for a small set that is copied from memory. A step that does not follow the last one is read anew.

    A process that is killed is found when its batch is asked for. torch's DataLoader would raise from a signal handler,
    in the midst of a step.
    """

    def __init__(self, source: Source, rank: int = 0, world: int = 1, workers: int = AUTO) -> None:
        self.source, self.rank, self.world = source, rank, world
        if workers == AUTO:
            quick = source.dataset.copies and source.dataset.nbytes() <= QUICK
            workers = 0 if quick else max(1, min(MOST_WORKERS, len(os.sched_getaffinity(0)) - 1))
        self.workers = workers
        self._pool: ProcessPoolExecutor | None = None
        self._ahead: deque[tuple[int, Future[Any]]] = deque()

    def read(self, step: int) -> tuple[Tensor, Tensor]:
        """The samples of a step as they are read, and their labels. Raises DataError."""
        if not self.workers:
            return self.source.raw(step, self.rank, self.world)
        while self._ahead and self._ahead[0][0] != step:
            self._ahead.popleft()[1].cancel()
        try:
            self._begin(step)
            return self._ahead.popleft()[1].result()
        except BrokenProcessPool:
            self._ahead.clear()
            raise DataError(
                f"--data {self.source.place}: a process that reads it was killed, as one is where memory runs out; "
                "give fewer with --set run.workers=1"
            ) from None

    def _begin(self, step: int) -> None:
        """Let this step and those after it be read."""
        if self._pool is None:
            # The index of a large set is shared with a process that is forked, and sent to any other.
            context = multiprocessing.get_context("fork")
            self._pool = ProcessPoolExecutor(self.workers, context, _begin_worker, (self.source, os.getpid()))
        with warnings.catch_warnings():  # from Python 3.12 on, of threads; those of torch do not run in the fork
            warnings.simplefilter("ignore", DeprecationWarning)
            for k in range(len(self._ahead), AHEAD * self.workers):
                self._ahead.append((step + k, self._pool.submit(_raw, step + k, self.rank, self.world)))

    def close(self) -> None:
        """End the processes."""
        self._ahead.clear()
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def _begin_worker(source: Source, parent: int) -> None:
    global _source
    _source = source
    signals.serve(parent)
    torch.set_num_threads(1)


def _raw(step: int, rank: int, world: int) -> tuple[Tensor, Tensor]:
    return _source.raw(step, rank, world)
