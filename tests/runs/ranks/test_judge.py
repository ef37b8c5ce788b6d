"""What is concluded from the beats of ranks, without a process."""

from dataclasses import replace

from soflow_fast.runs.ranks.judge import Beat, Judge, Limits

LIMITS = Limits()
START = Beat(0, "gpu01", 0, "start", 0, 0.0)


class Ranks:
    """The beats of some ranks, second after second."""

    def __init__(self, world: int, hang_seconds: float = 20) -> None:
        self.judge = Judge(range(world), LIMITS, hang_seconds)
        self.clock = 0.0
        self.beats = {rank: replace(START, host=f"gpu{rank // 2:02d}") for rank in range(world)}

    def second(self, *silent: int, **changes: object) -> str:
        """One more second, in which some ranks say nothing. Returns the line of what ends the run."""
        self.clock += 1
        for rank in self.beats.keys() - set(silent):
            beat = self.beats[rank]
            self.beats[rank] = replace(beat, count=beat.count + 1, **changes)
        self.judge.hear(self.clock, {rank: beat.to_json().encode() for rank, beat in self.beats.items()})
        found = self.judge.failure(self.clock, 0)
        return found.line() if found else ""

    def steps(self, count: int) -> None:
        """So many seconds with a step in each."""
        for _ in range(count):
            step = self.beats[0].step + 1
            assert self.second(step=step, phase="step", marks=2 * step, usual=1.0) == ""

    def seconds_until(self, *silent: int, most: int = 4000) -> tuple[int, str]:
        """After how many seconds the run ends, and with which line."""
        for count in range(1, most):
            if line := self.second(*silent):
                return count, line
        return most, ""


def test_a_silent_rank_is_dead_after_ten_seconds_and_not_before() -> None:
    ranks = Ranks(4)
    ranks.steps(5)
    seconds, line = ranks.seconds_until(3)
    assert 10 < seconds <= 13
    assert line == "error: rank 3 (gpu01): died or lost its connection at step 5"


def test_more_patience_before_the_first_step_and_less_once_a_connection_is_lost() -> None:
    ranks = Ranks(4)
    assert 20 < ranks.seconds_until(3)[0] <= 23
    ranks = Ranks(4)
    ranks.steps(5)
    ranks.beats[0] = replace(ranks.beats[0], lost=True)
    assert 5 < ranks.seconds_until(3)[0] <= 8


def test_a_machine_is_one_death() -> None:
    ranks = Ranks(4)
    ranks.steps(5)
    ranks.second(2)  # rank 3 was heard a moment longer
    assert ranks.seconds_until(2, 3)[1] == "error: rank 2 (gpu01): died or lost its connection at step 5, as did 1 more"


def test_a_beat_that_is_late_is_no_death() -> None:
    ranks = Ranks(2)
    ranks.steps(5)
    for _ in range(5):
        for _ in range(9):
            assert ranks.second(1) == ""
        ranks.steps(1)


def test_the_rank_behind_hangs() -> None:
    """That is at a smaller step, or does not wait in the step, or waits for no other rank, or is where no other is."""
    where = {"where": "distributed_c10d.py:3252", "waits": True}
    for behind, others in (
        ({"step": 4}, {}),
        ({"phase": "data", "where": "loader.py:88"}, where),
        ({"where": "loader.py:88"}, where),
        ({"where": "step.py:9"}, {"where": "trainer.py:7"}),
    ):
        ranks = Ranks(4)
        ranks.steps(5)
        ranks.beats = {rank: replace(beat, **others) for rank, beat in ranks.beats.items()}
        ranks.beats[2] = replace(ranks.beats[2], **behind)
        seconds, line = ranks.seconds_until()
        assert 20 <= seconds <= 22
        assert line.startswith("error: rank 2 (gpu01): no progress for "), line
        assert str(behind.get("where", "")) in line


def test_where_all_are_in_one_place_nobody_is_blamed() -> None:
    ranks = Ranks(4)
    ranks.steps(5)
    assert ranks.seconds_until()[1] == "error: no progress for 21 s at step 5, in step, on all ranks"


def test_of_two_ranks_the_one_that_waits_is_innocent_and_both_are_named_where_neither_does() -> None:
    ranks = Ranks(2)
    ranks.steps(5)
    ranks.beats[0] = replace(ranks.beats[0], where="graph.py:841", waits=True)
    ranks.beats[1] = replace(ranks.beats[1], where="attention.py:7")
    line = ranks.seconds_until()[1]
    assert line == "error: rank 1 (gpu00): no progress for 21 s at step 5, in step (attention.py:7)"
    ranks.beats[0] = replace(ranks.beats[0], waits=False)
    each = "rank 0 (gpu00) in step (graph.py:841), rank 1 (gpu00) in step (attention.py:7)"
    assert ranks.seconds_until()[1].endswith(f" s at step 5: {each}")


def test_patience_before_the_first_step_in_long_phases_and_with_slow_steps() -> None:
    assert 3600 <= Ranks(2).seconds_until()[0] <= 3602
    ranks = Ranks(2)
    ranks.steps(5)
    ranks.second(phase="save", marks=99)
    assert 3600 <= ranks.seconds_until()[0] <= 3602
    ranks = Ranks(2)
    ranks.steps(5)
    ranks.second(usual=30.0, marks=99)
    assert 300 <= ranks.seconds_until()[0] <= 302
    ranks = Ranks(2, hang_seconds=0)
    ranks.steps(5)
    assert ranks.seconds_until() == (4000, "")


def test_the_first_rank_of_another_machine_and_the_end() -> None:
    ranks = Ranks(4)
    assert ranks.judge.spare() == 0
    ranks.second()
    assert ranks.judge.spare() == 2 and not ranks.judge.all_left()
    ranks.second(left=True)
    assert ranks.judge.all_left()
