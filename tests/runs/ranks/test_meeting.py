"""Ranks that come together, and those that fail before."""

import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from soflow_fast.errors import ConfigError
from soflow_fast.launch import Launch
from soflow_fast.runs.ranks.failure import Failure
from soflow_fast.runs.ranks.judge import Limits
from soflow_fast.runs.ranks.meeting import Ended, Meeting
from soflow_fast.runs.ranks.watch import watched
from tests.forked import free_port, on_ranks

LIMITS = Limits(period=0.1, silence=0.6, patience=2.4)


def comes(launch: Launch, how: dict[int, str]) -> tuple[str, int] | str:
    """What becomes of a rank that comes, comes late, or fails before, with a text."""
    meeting, what = Meeting(launch, LIMITS), how.get(launch.rank, "comes")
    if what == "late":
        time.sleep(0.6)
    try:
        if what in ("comes", "late"):
            meeting.meet().add("there", 1)
            while launch.rank == 0 and meeting.store.add("there", 0) < launch.world:  # it keeps the store
                time.sleep(0.02)
            return "met"
        line = meeting.leave_word(Failure(launch.rank, launch.host, what, 2, "error"))
        assert line is not None
    except Ended as ended:
        line = ended.line
        assert ended.code == 2
    meeting.linger()
    return line, 2


def test_ranks_meet_however_late_they_come() -> None:
    assert on_ranks(2, comes, {0: "late"}) == on_ranks(2, comes, {1: "late"}) == ["met", "met"]


@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_fails_before_ends_those_that_wait_and_those_that_come_later(rank: int) -> None:
    line = f"error: rank {rank} (host{rank}): --steps 0"
    for other in ("comes", "late"):
        found = on_ranks(2, comes, {rank: "--steps 0", 1 - rank: other})
        assert found[rank] == (line, 2) and found[1 - rank] == ("", 2)


def test_what_all_do_wrong_is_told_once_and_of_nobody() -> None:
    found = on_ranks(2, comes, {0: "--steps 0", 1: "--steps 0"})
    assert sorted(found) == [("", 2), ("error: --steps 0", 2)]
    found = on_ranks(2, comes, {0: "shard 0", 1: "shard 1"})
    assert {("", 2)} < set(found) and "(host" in max(found)[0]


def test_a_rank_that_does_not_come_is_named() -> None:
    said: list[str] = []
    meeting = Meeting(Launch(0, 4, 0, 4, "127.0.0.1", free_port(), "a"), LIMITS, said.append)
    with pytest.raises(Ended, match=r"error: ranks 1, 2, 3 did not come to 127.0.0.1:\d+ within 2 s"):
        meeting.meet()
    assert len(said) == 1 and said[0].startswith("waiting for ranks 1, 2, 3 at 127.0.0.1:")
    alone = Meeting(Launch(1, 2, 1, 2, "127.0.0.1", free_port(), "a"), LIMITS, said.append)
    with pytest.raises(Ended, match="error: rank 0 did not come"):
        alone.meet()
    assert said[1].startswith("waiting for rank 0 at ")


@pytest.fixture
def other_program() -> Iterator[int]:
    """A port at which a program listens that is no store."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        found.listen()
        yield found.getsockname()[1]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_port_that_another_program_has_taken(rank: int, other_program: int) -> None:
    began = time.monotonic()
    with pytest.raises(Ended) as ended:
        Meeting(Launch(rank, 2, 0, 1, "127.0.0.1", other_program, "a"), LIMITS).meet()
    assert ended.value.line.startswith(f"error: MASTER_PORT {other_program}: 2 ranks cannot meet there: ")
    assert ended.value.code == 2 and time.monotonic() - began < 4


def test_an_address_that_is_none_is_told_by_the_first_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any, **__: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    for rank, text in ((0, "MASTER_ADDR nowhere: 2 ranks cannot meet there: Name or service not known"), (1, "")):
        with pytest.raises(Ended) as ended:
            Meeting(Launch(rank, 2, rank, 2, "nowhere", 1, "a"), LIMITS).meet()
        assert ended.value.line == (text and f"error: {text}")
    with pytest.raises(ConfigError, match="MASTER_ADDR nowhere"):
        watched(Launch(0, 2, 0, 2, "nowhere", 1, "a"), 0, LIMITS).__enter__()


def test_a_rank_of_another_run_is_not_taken_for_ours() -> None:
    port = free_port()

    def again(launch: Launch) -> str:
        try:
            time.sleep(0.3 * launch.rank)
            Meeting(Launch(launch.rank and 1, 3, 0, 1, "127.0.0.1", port, "a"), LIMITS).meet()
        except Ended as ended:
            return ended.line
        return ""

    assert "cannot meet there: another run does" in on_ranks(3, again)[2]
