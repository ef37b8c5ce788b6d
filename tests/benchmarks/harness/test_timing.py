"""The one timer: rounds in turn, those that do not count, calls that run out of memory."""

from contextlib import nullcontext
from functools import partial

import torch

from benchmarks.harness import ceilings
from benchmarks.harness.timing import InTurn, Stopwatch, recorded
from tests.benchmarks.tiny import CPU


def named(*names: str) -> tuple[InTurn, list[str]]:
    timer, came = InTurn(CPU), []
    for name in names:
        timer.add(name, partial(came.append, name))
    return timer, came


def test_nobody_always_comes_after_the_same():
    timer, came = named("ours", "a", "b", "c")
    for _ in range(3):
        timer.round(but="ours")
    assert "".join(came) == "abcbcacab"
    assert [len(timer.seconds[name]) for name in timer.calls] == [0, 3, 3, 3]


def test_rounds_that_fit_are_judged_by_one_that_does_not_count():
    timer, came = named("a", "b")
    timer._stopwatch.seconds = lambda call: call() or 2.0  # pyright: ignore[reportAttributeAccessIssue]
    for seconds, wanted in ((0.0, 5), (40.0, 10), (4000.0, 100)):
        assert timer.rounds_within(seconds, least=5, most=100, trials=2) == wanted
    assert len(came) == 3 * 2 * 2 and timer.seconds == {"a": [], "b": []}


def test_a_run_drops_the_call_that_runs_out_of_memory():
    later = iter([None, None])

    def falls() -> None:
        if next(later, 0) == 0:
            raise torch.OutOfMemoryError("none left")

    timer, came = named("a", "b")
    kept: list[float] = []
    timer.add("falls", falls, kept)
    assert timer.run(0.0, least=5, most=100, warm_up=2) == ["falls"]
    assert came.count("a") == came.count("b") == 5 and kept == []
    assert len(timer.seconds["a"]) == len(timer.seconds["b"]) == 3
    assert timer.run(60.0, least=1, most=4) == [] and len(timer.seconds["a"]) == 7
    timer.clear()
    assert timer.run(60.0, least=1, most=4) == []


def test_a_call_is_timed_to_its_end():
    assert 0 < Stopwatch(CPU).seconds(lambda: sum(range(100))) < 60
    assert 0 < Stopwatch(CPU, cold=True).seconds(lambda: sum(range(100))) < 60


def test_a_call_is_recorded_behind_a_warm_one(monkeypatch):
    """A stand-in for CUDA: one call before the recording, one in it, and then replays alone."""
    came: list[str] = []

    class Stand:
        def __init__(self, *given):
            pass

        def __enter__(self):
            came.append("recording")

        def __exit__(self, *error):
            came.append("recorded")

        def wait_stream(self, other):
            pass

        def replay(self):
            came.append("replay")

    for name in ("CUDAGraph", "Stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, Stand)
    monkeypatch.setattr(torch.cuda, "current_stream", Stand)
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda *given: nullcontext())
    replay = recorded(lambda: came.append("call"), torch.device("cuda:1"))
    assert came == ["call", "recording", "call", "recorded"]
    replay()
    replay()
    assert came[4:] == ["replay", "replay"]


def test_ceilings_come_from_the_one_copy():
    row = ceilings.copy(CPU, rounds=3, size=4096)
    assert row["bytes"] == 8192 and len(row["seconds"]) == 3
    assert ceilings.product_ceiling(CPU, "fp32") > 1e6 and ceilings.copy_ceiling(CPU) > 1e6
