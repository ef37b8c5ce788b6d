"""The way of batches to the device: pinned memory, a stream of its own, and the right batch whatever was begun."""

import contextlib
import weakref

import pytest
import torch

from soflow_fast.data import InMemory, Source
from soflow_fast.runs.batches import upload
from soflow_fast.runs.batches.upload import Batches


@pytest.fixture
def source():
    images = torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1)
    return Source(InMemory(images, torch.arange(20)), seed=3, batch_size=4)


def test_a_cpu_takes_them_as_they_are(source):
    batches = Batches(source, torch.device("cpu"), rank=1, world=2)
    batches.begin(3)
    for got, wanted in zip(batches.of(3), source.batch(3, 1, 2), strict=True):
        assert torch.equal(got, wanted)


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda without a GPU; notes what happens, in order."""
    happened, streams = [], ["current"]

    class Stream:
        def __init__(self, device):
            self.name = f"side of {device}"

        def wait_event(self, event):
            happened.append(("wait for event", event, self.name))

    class Current:
        events = 0

        def wait_stream(self, stream):
            happened.append(("wait", stream.name))

        def record_event(self):
            self.events += 1
            happened.append(("event", self.events))
            return self.events

    current = Current()

    @contextlib.contextmanager
    def on(stream):
        streams.append(stream.name)
        yield
        streams.pop()

    class Pinned(torch.Tensor):
        def to(self, device, non_blocking=False):
            assert non_blocking
            happened.append(("copy", str(device), streams[-1]))
            return self.as_subclass(torch.Tensor).clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.as_subclass(Pinned))
    for name, value in (
        ("Stream", Stream), ("stream", on), ("device", contextlib.nullcontext), ("current_stream", lambda d: current),
    ):  # fmt: skip
        monkeypatch.setattr(upload.torch.cuda, name, value)
    return happened


def test_the_next_batch_is_on_its_way_while_the_present_one_is_used(source, cuda):
    batches = Batches(source, torch.device("cuda", 1))
    side = "side of cuda:1"
    first = batches.of(0)
    assert cuda == [("copy", "cuda:1", side)] * 2 + [("event", 1), ("wait", side)]
    cuda.clear()
    batches.begin(1)
    assert cuda == [("wait for event", 1, side)] + [("copy", "cuda:1", side)] * 2
    second = batches.of(1)
    assert cuda[3:] == [("event", 2), ("wait", side)]
    batches.begin(2)
    fifth = batches.of(5)  # another one than was begun: after a step was made again, say
    for step, got in ((0, first), (1, second), (5, fifth)):
        for value, wanted in zip(got, source.batch(step), strict=True):
            assert torch.equal(value.as_subclass(torch.Tensor), wanted)


def test_the_memory_of_a_batch_is_taken_again_once_its_step_is_done(source, cuda):
    """By the copy of the next but one, which waits for the end of that step and of no later one."""
    batches, side = Batches(source, torch.device("cuda", 1)), "side of cuda:1"
    alive = []
    for step in range(4):
        alive.append(weakref.ref(batches.of(step)[1]))
        cuda.clear()
        batches.begin(step + 1)
        assert cuda[0] == ("wait for event", step + 1, side)  # recorded before this step, after the one before it
        assert [ref() is not None for ref in alive] == [False] * step + [True]
