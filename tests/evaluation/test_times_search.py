"""The search for the times of network calls, on functions whose least value is known."""

import pytest

from soflow_fast.evaluation import Tried, best_of, search_times
from soflow_fast.evaluation.times_search import Times


@pytest.mark.parametrize("best", [0.05, 0.31, 0.618, 0.95])
def test_one_time_is_found(best: float) -> None:
    told: list[Tried] = []
    tried = search_times(lambda times: (times[1] - best) ** 2, 2, told.append)
    # The golden section ends within 0.02, and times are thousandths.
    assert best_of(tried).times[1] == pytest.approx(best, abs=0.02)
    assert told == tried and tried[0].times == (1.0, 0.5) and len(tried) <= 20
    assert len({one.times for one in tried}) == len(tried), "none is tried twice"


def test_the_deeper_of_two_valleys_is_found() -> None:
    """A golden section alone would end in the one at 0.7, which is the broader."""
    tried = search_times(lambda times: min((times[1] - 0.7) ** 2, 25 * (times[1] - 0.2) ** 2 - 0.02), 2)
    assert best_of(tried).times[1] == pytest.approx(0.2, abs=0.02)


def test_more_times_are_found_one_after_the_other_and_fall() -> None:
    goal = (1.0, 0.8, 0.3, 0.15)
    tried = search_times(lambda times: sum((a - b) ** 2 for a, b in zip(times, goal, strict=True)), 4)
    assert best_of(tried).times == pytest.approx(goal, abs=0.03)
    for one in tried:
        assert one.times[0] == 1 and all(a > b > 0 for a, b in zip(one.times, one.times[1:], strict=False))


def test_the_figure_that_is_known_is_that_of_the_best() -> None:
    """A rough figure: the best is the least of all that was tried, wherever the search went."""
    figure = lambda times: hash(times) % 1009 / 1009  # noqa: E731
    tried = search_times(figure, 3)
    assert best_of(tried).figure == min(map(figure, (one.times for one in tried)))
    assert best_of([Tried((1.0, 0.5), 2.0), Tried((1.0, 0.4), 2.0)]).times == (1.0, 0.5)


def test_one_call_has_nothing_to_search_for() -> None:
    def never(times: Times) -> float:
        raise AssertionError(times)

    with pytest.raises(ValueError, match="nothing to search for"):
        search_times(never, 1)
