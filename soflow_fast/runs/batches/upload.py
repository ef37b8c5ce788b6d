"""The way of a run's batches to its device."""

from typing import Any

import torch
from torch import Tensor

from ...config.schema import AUTO
from ...data import Source
from .loader import Reader
from .resident import Resident


class Batches:
    """The batches of a source on a device. On a GPU the next one can be on its way while the present one is used.

    Its copy starts from pinned memory, on a stream of its own: from other memory the host would wait for the copy, and
    so for all that the GPU was told before. A batch is kept until the work that was told up to the next `of` is done
    with it, which is when the copy after that begins.
    """

    def __init__(
        self,
        source: Source,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
        workers: int = AUTO,
        *,
        resident: bool = False,
    ) -> None:
        """resident: all samples are put on the device at once, and no batch is on its way any more.

        Raises DataError, and torch.OutOfMemoryError if they have no room there.
        """
        self.source, self.device, self.rank, self.world = source, device, rank, world
        self._resident = Resident(source, device) if resident else None
        self._reader = Reader(source, rank, world, workers)
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._begun: tuple[int, tuple[Tensor, ...]] | None = None
        self._present: tuple[Tensor, ...] = ()
        self._past: tuple[tuple[Tensor, ...], Any] = (), None
        """The batch before the present one, and the event after which nobody reads it."""

    def begin(self, step: int) -> None:
        """Send the batch of a step on its way. On a CPU there is no way to go."""
        if self._stream is None or self._resident is not None:
            return
        self._begun = None
        values = [value.pin_memory() for value in self._reader.read(step)]
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            if self._past[1] is not None:
                self._stream.wait_event(self._past[1])
            self._past = (), None  # whose memory this copy may take
            self._begun = step, tuple(value.to(self.device, non_blocking=True) for value in values)

    def of(self, step: int) -> Any:
        """(samples, labels) of a step, the samples float32 as a model takes them. Raises DataError."""
        if self._resident is not None:
            raw, labels = self._resident.of(step, self.rank, self.world)
            return self._decoded(raw, step), labels
        if self._stream is None:
            raw, labels = self._reader.read(step)
            return self._decoded(raw, step), labels
        if self._begun is None or self._begun[0] != step:
            self.begin(step)
        assert self._begun is not None
        values, self._begun = self._begun[1], None
        current = torch.cuda.current_stream(self.device)
        self._past = self._present, current.record_event()
        self._present = values
        current.wait_stream(self._stream)
        return self._decoded(values[0], step), values[1]

    def _decoded(self, raw: Tensor, step: int) -> Tensor:
        return self.source.decoded(raw, step, self.rank, self.world)

    def give_up_memory(self) -> bool:
        """Take the data set off the device; its batches come from the host from now on. Whether it was there."""
        was, self._resident = self._resident is not None, None
        return was

    def close(self) -> None:
        """End the processes that read ahead."""
        self._reader.close()
