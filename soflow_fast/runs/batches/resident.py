"""A data set that lies on the GPU as a whole, twins and all: a batch then costs the choice of its rows."""

import torch
from torch import Tensor

from ...data import Source

PART = 2**26
"""Bytes that are read and sent at a time."""


def on_device_bytes(source: Source) -> int | None:
    """Bytes of a data set on a device; None: it is not one to be held there, as reading it is more than copying."""
    if not source.dataset.copies:
        return None
    vectors = source.dataset.conditions
    return source.dataset.nbytes() * (2 if source.flip else 1) + (0 if vectors is None else vectors.nbytes)


class Resident:
    """All samples of a source, as they are read, and their labels or vectors.

    Raises DataError for what cannot be read, and torch.OutOfMemoryError.
    """

    def __init__(self, source: Source, device: torch.device) -> None:
        self.source, self.device = source, device
        N, dataset = len(source), source.dataset
        first = dataset.read(torch.tensor([0]))
        rows = max(1, PART // max(first.nbytes, 1))
        kinds = (False, True) if source.flip else (False,)
        self.samples = torch.empty(len(kinds) * N, *first.shape[1:], dtype=first.dtype, device=device)
        for kind in kinds:
            for index in torch.arange(N).split(rows):
                flags = torch.full((len(index),), kind) if source.flip else None
                at = int(index[0]) + N * kind
                self._send(self.samples[at : at + len(index)], dataset.read(index, flags))
        one = dataset.given(torch.tensor([0]))
        self.given = torch.empty(N, *one.shape[1:], dtype=one.dtype, device=device)
        for index in torch.arange(N).split(max(1, PART // one.nbytes)):
            self._send(self.given[int(index[0]) : int(index[-1]) + 1], dataset.given(index))

    def of(self, step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
        """What `Source.raw` returns, on the device: samples and labels or vectors of a step."""
        index, mirrored = self.source.indices(step, rank, world), self.source.mirrored(step, rank, world)
        rows = index if mirrored is None else index + len(self.source) * mirrored
        places = torch.empty(2, len(index), dtype=torch.int64, device=self.device)
        self._send(places, torch.stack([rows, index]))
        return self.samples[places[0]], self.given[places[1]]

    def _send(self, there: Tensor, values: Tensor) -> None:
        """Copy to the device, from pinned memory, so that the host does not wait for the copy."""
        there.copy_(values.pin_memory() if self.device.type == "cuda" else values, non_blocking=True)
