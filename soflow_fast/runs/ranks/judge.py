"""What each rank says of itself once a second, and what is concluded: that one has died, or that one hangs."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

from .failure import Failure, name

BRIEF = ("data", "step")
"""The phases of a rank that last no longer than a usual step; others, as "save", are waited for with patience."""


MOST_NAMED = 8
"""Ranks in one line."""


@dataclass(frozen=True)
class Limits:
    """Seconds."""

    period: float = 1.0
    """Between two looks."""
    silence: float = 10.0
    """After which a rank that says nothing counts as dead. Half of it once another has lost a connection, twice before
    the first step is done, while much is compiled and loaded."""
    agreement: float = 5.0
    """For which a rank that failed waits for the others, which may fail alike."""
    patience: float = 600.0
    """For the others to start."""
    long: float = 3600.0
    """Without a mark, for a first step, which compiles, and for phases that are not brief."""


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself. `count` grows with each."""

    count: int
    host: str
    step: int
    phase: str
    marks: int
    """How often the main thread has said where it is."""
    usual: float
    """Seconds of a usual step; 0 before the first one is done."""
    where: str = ""
    """Its line of code (`place`), once the main thread has said nothing for a while."""
    waits: bool = False
    """Whether it waits for other ranks there."""
    lost: bool = False
    """Whether it has lost the connection to another rank."""
    left: bool = False
    """Whether it is done, and waits for the others to be."""
    spare: int = 0
    """Of rank 0: the first rank on another machine; 0: there is none."""

    def to_json(self) -> str:
        return json.dumps(astuple(self))


class Judge:
    """Hears the beats of some ranks, of whose `clock` it is told: seconds in which this process ran."""

    def __init__(self, ranks: range, limits: Limits, hang_seconds: float) -> None:
        self.beats: dict[int, Beat] = {}
        self._ranks, self._limits, self._hang_seconds = ranks, limits, hang_seconds or math.inf
        self._heard = dict.fromkeys(ranks, 0.0)
        self._moved = 0.0
        self._marks: dict[int, int] = {}

    def hear(self, clock: float, beats: Mapping[int, bytes]) -> None:
        """Take in what ranks have said last; b"" where it was nothing yet."""
        for rank, text in beats.items():
            known = self.beats.get(rank)
            if text and (beat := Beat(*json.loads(text))) != known:
                self.beats[rank] = beat
                self._heard[rank] = clock
        marks = {rank: beat.marks for rank, beat in self.beats.items()}
        if marks != self._marks:
            self._marks, self._moved = marks, clock

    def all_left(self) -> bool:
        """Whether every rank is done."""
        return len(self.beats) == len(self._ranks) and all(beat.left for beat in self.beats.values())

    def spare(self) -> int:
        """The first rank on another machine than the first one; 0: there is none yet."""
        first = self.beats.get(0)
        others = (rank for rank in sorted(self.beats) if first and self.beats[rank].host != first.host)
        return next(others, 0)

    def silent(self, clock: float, suspicious: bool = False) -> list[int]:
        """The ranks that count as dead, the one that said nothing for longest first. suspicious: as if one of those
        that are heard had lost a connection."""
        beats = self.beats.values()
        limit = self._limits.silence
        if suspicious or any(beat.lost for beat in beats):
            limit /= 2
        elif len(beats) < len(self._ranks) or not all(beat.usual for beat in beats):
            limit *= 2
        found = sorted((heard, rank) for rank, heard in self._heard.items() if clock - heard > limit)
        # One that goes takes the others of its machine with it, which were heard a moment later.
        late = found and clock - found[0][0] > limit + 1.5 * self._limits.period
        return [rank for _, rank in found] if late else []

    def failure(self, clock: float, step: int, suspicious: bool = False) -> Failure | None:
        """What ends the run: a rank that died, or one that keeps the others waiting. step: of the judge's rank."""
        if found := self.silent(clock, suspicious):
            return self.dead(found, step)
        quiet = clock - self._moved
        return self._hang(quiet) if quiet > self._patience() else None

    def dead(self, found: Sequence[int], step: int) -> Failure:
        """The failure of ranks that are not heard any more; the others wait for them at the latest step."""
        beat = self.beats.get(found[0])
        latest = max([step, *(known.step for known in self.beats.values())])
        text = "died or lost its connection " + (f"at step {latest}" if beat else "as it started")
        if found[1:]:
            text += f", as did {len(found) - 1} more"
        return Failure(found[0], beat.host if beat else "", text, 1, "judged")

    def _patience(self) -> float:
        """Seconds without a mark of any rank after which they hang."""
        beats = self.beats.values()
        if any(beat.lost for beat in beats):  # whoever is to blame is about to be found silent
            return math.inf
        limit = max(self._hang_seconds, 10 * max((beat.usual for beat in beats), default=0))
        brief = all(beat.usual and beat.phase in BRIEF for beat in beats)
        return limit if brief and len(beats) == len(self._ranks) else max(limit, self._limits.long)

    def _hang(self, quiet: float) -> Failure:
        """Blame the rank that is behind; of ranks at the same step, one that is not in the step, then one that does
        not wait for others, then the one that is where no other is. If none differs, all are named with their places,
        or nobody where these are the same."""
        places = Counter(beat.where for beat in self.beats.values())
        order = {
            rank: (beat.left, beat.step, beat.phase == "step", beat.waits, places[beat.where])
            for rank, beat in self.beats.items()
        }
        rank = min(order, key=lambda rank: (order[rank], rank))
        beat = self.beats[rank]
        what = f"no progress for {quiet:.0f} s at step {beat.step}"
        if len(set(order.values())) > 1 or len(order) == 1:
            return Failure(rank, beat.host, f"{what}, in {_doing(beat)}", 1, "judged")
        if len(places) == 1:
            return Failure(rank, beat.host, f"{what}, in {_doing(beat)}, on all ranks", 1, "all")
        each = [f"{name(rank, beat.host)} in {_doing(beat)}" for rank, beat in sorted(self.beats.items())]
        more = f" and {len(each) - MOST_NAMED} more" if each[MOST_NAMED:] else ""
        return Failure(rank, beat.host, f"{what}: {', '.join(each[:MOST_NAMED])}{more}", 1, "all")


def _doing(beat: Beat) -> str:
    return beat.phase + (f" ({beat.where})" if beat.where else "")
