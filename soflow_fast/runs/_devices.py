"""Batches handed round several devices, a thread for each, and what the devices make of them, in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..errors import Interrupted

IN_FLIGHT = 4
"""Batches that a device may have been handed before the first of them is asked for: enough to go on with while a shard
is brought to the disk. On a GPU they take turns with the same memory."""

Work = Callable[[Tensor], tuple[Tensor, ...]]
"""What a device makes of a batch that lies on it."""
_Made = tuple[tuple[Tensor, ...], Any]
"""Results on the host, and the event after which they are there; None: they are there."""


class Devices:
    """A context in which each device works in a thread of its own: torch lets others run while it is at work.

    A block that ends well or by an Exception waits for the batches that are being worked on. One that is interrupted
    does not, and asks that the process do not either.

    Args:
        devices: take turns, in order.
        work_on: gives the work of a device, once, when its first batch is there.
    """

    def __init__(self, devices: Sequence[torch.device], work_on: Callable[[torch.device], Work]) -> None:
        self._devices, self._work_on = devices, work_on
        self._begun: list[tuple[ThreadPoolExecutor, Work]] = []

    def results(self, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        """What is made of each batch, on the host, in order, soon after it is there. Raises what the work raises."""
        handed: deque[Future[_Made]] = deque()
        for number, batch in enumerate(batches):
            handed.append(self._hand(number % len(self._devices), batch))
            while len(handed) == IN_FLIGHT * len(self._devices) or (handed and _is_there(handed[0])):
                yield _arrived(handed.popleft())
        while handed:
            yield _arrived(handed.popleft())

    def _hand(self, k: int, batch: Tensor) -> Future[_Made]:
        device = self._devices[k]
        if k == len(self._begun):
            self._begun.append((ThreadPoolExecutor(1, f"device-{k}"), self._work_on(device)))
        thread, work = self._begun[k]
        return thread.submit(_made, work, device, batch)

    def __enter__(self) -> "Devices":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Interrupted):
            error.at_once = True
        for wait in [False] if isinstance(error, Interrupted) else [False, True]:  # all are told before any is awaited
            for thread, _ in self._begun:
                thread.shutdown(wait=wait, cancel_futures=True)


def _made(work: Work, device: torch.device, batch: Tensor) -> _Made:
    """In the thread of a device. A GPU is told what to do and not waited for, so that it has the next batch in time."""
    if device.type != "cuda":
        return tuple(value.cpu() for value in work(batch.to(device))), None
    found = work(batch.pin_memory().to(device, non_blocking=True))
    host = tuple(value.to("cpu", non_blocking=True) for value in found)  # pinned, as that is not to block
    event = torch.cuda.Event(blocking=True)  # the one who waits leaves its processor to those that decode
    return host, torch.cuda.current_stream(device).record_event(event)


def _is_there(future: Future[_Made]) -> bool:
    if not future.done():
        return False
    event = None if future.exception() else future.result()[1]
    return event is None or event.query()


def _arrived(future: Future[_Made]) -> tuple[Tensor, ...]:
    values, event = future.result()
    if event is not None:
        event.synchronize()
    return values
