"""What a watch says to the others, without a process."""

from io import StringIO
from typing import Any

from soflow_fast.runs.progress import Progress
from soflow_fast.runs.ranks.failure import Failure
from soflow_fast.runs.ranks.notes import Notes
from soflow_fast.runs.ranks.watch import Watch


class Counts:
    """A store of which a test sees the order of what is added."""

    def __init__(self) -> None:
        self.added: list[str] = []

    def add(self, key: str, amount: int) -> int:
        self.added.append(key)
        return amount


def test_a_text_is_counted_before_its_rank_is() -> None:
    """Another rank reads how many failed alike once all have failed."""
    watch: Any = Watch()
    watch._store, watch._failure = Counts(), Failure(1, "a", "--data x: is gone", 2, "error")
    assert watch._own_failure() == watch._own_failure() == watch._failure
    assert watch._store.added == [watch._failure.alike(), "failed"]


def test_what_a_rank_reports_is_a_mark() -> None:
    watch = Watch()
    progress = Progress(10, StringIO(), Notes(1), at_work=watch.at_work)
    progress.count(3, 1.0, 0.0)
    progress.say("epoch 3 of the VAE")
    assert watch._marks == 2
