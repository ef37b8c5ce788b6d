"""Batches handed round several devices, a thread for each, and what the devices make of them, in order."""

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..errors import Interrupted

Batch = TypeVar("Batch")
Module = TypeVar("Module", bound=nn.Module)

IN_FLIGHT = 4
"""Batches that a device may have been handed before the first of them is asked for: enough to go on with while a shard
is brought to the disk. On a GPU they take turns with the same memory."""

Work = Callable[[Batch], tuple[Tensor, ...]]
"""What a device makes of a batch, tensors that lie on it."""
_Made = tuple[tuple[Tensor, ...], Any]
"""Results on the host, and the event after which they are there; None: they are there."""


class Devices(Generic[Batch]):
    """A context in which each device works in a thread of its own: torch lets others run while it is at work.

    A block that ends well or by an Exception waits for the batches that are being worked on. One that is interrupted
    does not, and asks that the process do not either.

    Args:
        devices: take turns, in order.
        work_on: gives the work of a device, once, when its first batch is there.
    """

    def __init__(self, devices: Sequence[torch.device], work_on: Callable[[torch.device], Work[Batch]]) -> None:
        self._devices, self._work_on = devices, work_on
        self._begun: list[tuple[ThreadPoolExecutor, Work[Batch]]] = []

    def results(self, batches: Iterable[Batch]) -> Iterator[tuple[Tensor, ...]]:
        """What is made of each batch, on the host, in order, soon after it is there. Raises what the work raises."""
        handed: deque[Future[_Made]] = deque()
        for number, batch in enumerate(batches):
            handed.append(self._hand(number % len(self._devices), batch))
            while len(handed) == IN_FLIGHT * len(self._devices) or (handed and _is_there(handed[0])):
                yield _arrived(handed.popleft())
        while handed:
            yield _arrived(handed.popleft())

    def _hand(self, k: int, batch: Batch) -> Future[_Made]:
        device = self._devices[k]
        if k == len(self._begun):
            begin = partial(torch.cuda.set_device, device) if device.type == "cuda" else None  # for this thread alone
            self._begun.append((ThreadPoolExecutor(1, f"device-{k}", begin), self._work_on(device)))
        thread, work = self._begun[k]
        return thread.submit(_made, work, device, batch)

    def __enter__(self) -> "Devices[Batch]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Interrupted):
            error.at_once = True
        for wait in [False] if isinstance(error, Interrupted) else [False, True]:  # all are told before any is awaited
            for thread, _ in self._begun:
                thread.shutdown(wait=wait, cancel_futures=True)


def uploaded(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. A GPU that has work is not waited for."""
    if x.device.type != "cpu" or device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def copied(module: Module, device: torch.device) -> Module:
    """A module on a device: itself if it is there, or a copy, of which nothing is made where the module is."""
    found = [*module.parameters(), *module.buffers()]
    if all(x.device.type == device.type and device.index in (None, x.device.index) for x in found):
        return module
    there: dict[int, Any] = {id(x): nn.Parameter(x.detach().to(device), x.requires_grad) for x in module.parameters()}
    there |= {id(x): x.to(device) for x in module.buffers()}
    return copy.deepcopy(module, there)


def _made(work: Work[Batch], device: torch.device, batch: Batch) -> _Made:
    """In the thread of a device. A GPU is told what to do and not waited for, so that it has the next batch in time."""
    if device.type != "cuda":
        return tuple(value.cpu() for value in work(batch)), None
    host = tuple(value.to("cpu", non_blocking=True) for value in work(batch))  # pinned, as that is not to block
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
