"""Numbers of a step that are not finite: the device notices them and refuses the update, the host reads of it later."""

from typing import NamedTuple

import torch
from torch import Tensor

PLACES = ("input", "guidance", "network", "teacher", "loss", "gradient")
"""Places where a number that is not finite may first be seen, in the order of a step. "teacher": the values and
increments behind the consistency target, the student's own as well."""
GIVE_UP = 10
"""Steps in a row that may be skipped."""

FiniteFlags = dict[str, Tensor]
"""Whether all numbers were finite, bool [], by place."""


class Refused(NamedTuple):
    """The steps that were refused."""

    skipped: int
    in_row: int
    """The last ones of them, without a good one since."""
    step: int
    """The last of them."""
    place: str
    given_up: bool
    """So many in a row that no update is made any more."""
    rank: int = -1
    """The first rank on which it was not finite; -1: on all."""


def note_finite(flags: FiniteFlags, place: str, *values: Tensor) -> None:
    """Note whether `values` are finite."""
    for value in values:
        finite = torch.isfinite(value.detach()).all()
        flags[place] = flags[place] & finite if place in flags else finite


class NonfiniteGuard:
    """Lets a step happen or not, and counts. After `limit` refused steps in a row none happens any more: however late
    the host reads of it, the weights are those before the first of them."""

    def __init__(self, device: torch.device, limit: int = 2**62) -> None:
        self.limit = limit
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        """The number of the next update."""
        self._counts = torch.zeros(5, dtype=torch.int64, device=device)  # skipped, in a row, step, place, rank

    def should_update(self, flags: FiniteFlags, first_ranks: Tensor | None = None) -> Tensor:
        """Whether the update may happen, bool []; counted if not. Nothing is copied to the host.

        first_ranks: for each of `PLACES` the first rank on which it is not finite, int64; None: there is one rank.
        """
        wrong = ~torch.stack([flags[place] for place in PLACES if place in flags])
        names = [PLACES.index(place) for place in PLACES if place in flags]
        skipped, in_row, step, place, rank = self._counts.unbind()
        any_wrong, held = wrong.any(), in_row >= self.limit
        counted = any_wrong & ~held
        # The first place is the largest of these numbers.
        first = torch.stack([row * (len(PLACES) - k) for row, k in zip(wrong.unbind(), names, strict=True)]).amax()
        if first_ranks is not None:
            at = (len(PLACES) - first).clamp(max=len(PLACES) - 1).view(1)
            rank = torch.where(counted, first_ranks.index_select(0, at).view(()), rank)
        self._counts.copy_(
            torch.stack(
                [
                    skipped + counted,
                    torch.where(held, in_row, (in_row + 1) * any_wrong),
                    torch.where(counted, self.step, step),
                    torch.where(counted, len(PLACES) - first, place),
                    rank,
                ]
            )
        )
        return ~(any_wrong | held)

    def skipped(self) -> Tensor:
        """The number of steps that were refused, int64 [], on the device."""
        return self._counts[0].clone()

    def read(self) -> Refused:
        """The counts, on the host: waits for the device."""
        skipped, in_row, step, place, rank = self._counts.tolist()
        return Refused(skipped, in_row, step, PLACES[place], in_row >= self.limit, rank)

    def restore(self, skipped: int, in_row: int) -> None:
        """Go on counting from there. A run that has become stricter since may make its next step."""
        self._counts.copy_(torch.tensor([skipped, min(in_row, self.limit - 1), 0, 0, -1]))
