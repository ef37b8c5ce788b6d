"""Ranks stop at the same step for a signal that has come to one of them, or to all."""

from collections.abc import Sequence

import torch
import torch.distributed as dist


class Agreement:
    """What signal ends the run, known to all ranks at the end of the same step, without a wait for a GPU.

    Made by all ranks together. Its words go by a gloo group of their own, while the step is computed.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")
        self._word = torch.zeros(3, dtype=torch.int64)
        self._work: dist.Work | None = None

    def begin(self, step: int, pending: Sequence[int]) -> None:
        """Begin step `step` with the signals that have come to this rank so far."""
        self._word = torch.tensor([pending[0] if pending else 0, step, -step])
        self._work = dist.all_reduce(self._word, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def end(self) -> int:
        """The number of the signal for which all ranks stop after this step; 0: they go on. Of several the largest."""
        assert self._work is not None
        self._work.wait()
        number, last, first = self._word.tolist()
        assert last == -first, f"ranks are at steps {-first} to {last}"
        return number
