"""Ranks stop at the same step, for a signal that has come to one of them or to all, or for a fault of one."""

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist


class Agreement:
    """What ends the run, known to all ranks at the same step, without a wait for a GPU.

    Made by all ranks together. Its words go by a gloo group of their own. patience: how long one waits for them; None:
    as torch does.
    """

    def __init__(self, patience: timedelta | None = None) -> None:
        self._group = dist.new_group(backend="gloo", timeout=patience)
        self._word = torch.zeros(4, dtype=torch.int64)
        self._work: dist.Work | None = None

    def begin(self, step: int, pending: Sequence[int], fault: bool = False) -> None:
        """Begin step `step` with the signals that have come to this rank so far. fault: it cannot make the step."""
        self._word = torch.tensor([pending[0] if pending else 0, int(fault), step, -step])
        self._work = dist.all_reduce(self._word, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def end(self) -> tuple[int, bool]:
        """The number of the signal for which all ranks stop after this step, 0: they go on, of several the largest; and
        whether a rank cannot make the step."""
        assert self._work is not None
        self._work.wait()
        number, fault, last, first = self._word.tolist()
        assert last == -first, f"ranks are at steps {-first} to {last}"
        return number, bool(fault)
