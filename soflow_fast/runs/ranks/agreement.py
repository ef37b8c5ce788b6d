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

    def reach(self, step: int, pending: Sequence[int], fault: bool = False) -> tuple[int, bool]:
        """Before step `step`: the number of the signal for which all ranks stop after it, 0: they go on, of several the
        largest; and whether a rank cannot make it.

        pending: the signals that have come to this rank so far. fault: it cannot make the step.
        """
        word = torch.tensor([pending[0] if pending else 0, int(fault), step, -step])
        dist.all_reduce(word, dist.ReduceOp.MAX, group=self._group)
        number, some_fault, last, first = word.tolist()
        assert last == -first, f"ranks are at steps {-first} to {last}"
        return number, bool(some_fault)
