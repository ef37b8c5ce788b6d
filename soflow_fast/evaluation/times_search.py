"""A search for the times of a sampler's network calls that give the least of a figure."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

GRID = 9
"""Times that are tried first, evenly spaced between the neighbours of the one that is sought."""
RATIO = (5**0.5 - 1) / 2
WIDTH = 0.02
"""The length of the interval at which a golden section ends."""
ROUNDS = 2
"""Of three and more calls: how often each time is sought, the others being as they are by then."""

Times = tuple[float, ...]


class Tried(NamedTuple):
    """Times of the network calls, falling from 1, and the figure that they gave."""

    times: Times
    figure: float


def search_times(
    figure: Callable[[Times], float], calls: int, tell: Callable[[Tried], None] = lambda tried: None
) -> list[Tried]:
    """The times that were tried, in their order; the best is the one with the least figure.

    Between the neighbours of a time a grid is tried first, and then a golden section around its best, as a figure may
    have more than one valley. The sampler should draw the same noise for all times, so that they alone make the
    difference.

    Args:
        figure: of the times of `calls` network calls; the less, the better.
        calls: at least 2, as the first time is always 1.
        tell: is told of each trial.

    Raises ValueError for fewer calls.
    """
    if calls < 2:
        raise ValueError("one network call starts at time 1: there is nothing to search for")
    known: dict[Times, float] = {}
    tried: list[Tried] = []

    def value(times: Times) -> float:
        if times not in known:
            known[times] = figure(times)
            tried.append(Tried(times, known[times]))
            tell(tried[-1])
        return known[times]

    best = evenly(calls)
    value(best)
    for _ in range(1 if calls == 2 else ROUNDS):
        before = best
        for k in range(1, calls):
            high, low = best[k - 1], (*best, 0.0)[k + 1]

            def at(t: float, k: int = k, around: Times = best) -> float:
                return value((*around[:k], round(t, 3), *around[k + 1 :]))

            best = min(_searched(at, low, high, best, k), key=lambda times: known[times])
        if best == before:
            break
    return tried


def _searched(at: Callable[[float], float], low: float, high: float, best: Times, k: int) -> list[Times]:
    """What was tried for the k-th of the times `best`, between two limits."""
    step = (high - low) / (GRID + 1)
    grid = [low + step * (i + 1) for i in range(GRID)]
    values = {t: at(t) for t in grid}
    centre = min(grid, key=lambda t: values[t])
    a, b = centre - step, centre + step
    while b - a > WIDTH:
        left, right = b - RATIO * (b - a), a + RATIO * (b - a)
        values |= {left: at(left), right: at(right)}
        a, b = (a, right) if values[left] <= values[right] else (left, b)
    return [best, *((*best[:k], round(t, 3), *best[k + 1 :]) for t in values)]


def evenly(calls: int) -> Times:
    """The times that a sampler takes by itself: 1, 1 - 1/n, ..."""
    return tuple(round(1 - k / calls, 3) for k in range(calls))


def best_of(tried: Sequence[Tried]) -> Tried:
    """The one with the least figure, of equal ones the first."""
    return min(tried, key=lambda one: one.figure)
