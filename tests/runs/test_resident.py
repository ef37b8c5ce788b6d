"""A data set that lies on the device: the same batches, where it has room, and back on the host where it has none."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from soflow_fast.config.presets import preset
from soflow_fast.config.schema import Config
from soflow_fast.data import InMemory, Source, latents
from soflow_fast.data.dataset import Wanted
from soflow_fast.data.latents import Header, Layout, Writer
from soflow_fast.runs import trainer
from soflow_fast.runs.batches import resident
from soflow_fast.runs.batches.resident import Resident, on_device_bytes
from soflow_fast.runs.batches.upload import Batches
from soflow_fast.training.memory_estimate import USABLE, estimate_memory
from soflow_fast.training.state import TrainState
from tests.data.numbered import Numbers

CPU, GPU = torch.device("cpu"), torch.device("cuda")
N = 11


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def dataset(tmp_path: Path) -> latents.Latents:
    """Latents and their twins in three shards."""
    draw = torch.Generator().manual_seed(0)
    writer = Writer(tmp_path / "latents", Header(Layout(2, 3, 3, True), N, 4, True, ("a", "b", "c")))
    rows, twins = (torch.rand(N, 4, 3, 3, generator=draw) for _ in range(2))
    writer.append(rows, torch.arange(N) % 3, twins)
    writer.close()
    return latents.load(tmp_path / "latents", Wanted(0, 0))


@pytest.fixture
def pixels() -> InMemory:
    images = torch.randint(256, (N, 1, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return InMemory(images, torch.arange(N))


@pytest.mark.parametrize("kind", ["dataset", "pixels"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("part", [1, 200, 2**26])
def test_batches_are_those_of_the_source(
    kind: str, flip: bool, part: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "PART", part)
    source = Source(request.getfixturevalue(kind), seed=3, batch_size=6, flip=flip)
    batches = Batches(source, CPU, rank=1, world=2, resident=True)
    for step in (0, 1, 2, 7, 8, 3):
        batches.begin(step + 1)
        for got, wanted in zip(batches.of(step), source.batch(step, 1, 2), strict=True):
            assert torch.equal(got, wanted)
    assert batches.give_up_memory() and not batches.give_up_memory()
    for got, wanted in zip(batches.of(4), source.batch(4, 1, 2), strict=True):
        assert torch.equal(got, wanted)


def test_bytes_are_those_that_are_taken(dataset: latents.Latents, pixels: InMemory) -> None:
    for samples, row in ((dataset, 2 * 4 * 9), (pixels, 4)):
        for flip in (False, True):
            source = Source(samples, seed=3, batch_size=6, flip=flip)
            assert on_device_bytes(source) == N * row * (1 + flip) == Resident(source, CPU).samples.nbytes
    assert on_device_bytes(Source(Numbers(20), seed=3, batch_size=6)) is None  # whose reading is more than a copy


@pytest.fixture
def config() -> Config:
    fields = {"model.hidden_size": 16, "model.depth": 1, "model.num_heads": 2, "model.num_classes": 3}
    return preset("digits", batch_size=6, device="cpu", precision="fp32", **fields)


def test_it_is_held_where_it_has_room_beside_a_step(
    config: Config, pixels: InMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, peak = Source(pixels, seed=3, batch_size=6), estimate_memory(config).peak
    size, there = on_device_bytes(source), 1000
    assert size
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: there)
    enough = int((size + peak - there) / USABLE) + 2

    def held(free: int, wanted: bool | None = None, on: torch.device = GPU) -> int:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2**40))
        run = dataclasses.replace(config.run, data_on_gpu=wanted)
        return trainer.bytes_to_hold(dataclasses.replace(config, run=run), source, on)

    monkeypatch.setattr("soflow_fast.training.memory_estimate.estimate_memory", lambda _: SimpleNamespace(peak=peak))
    assert held(enough) == size and not held(enough - 4) and not held(size)
    assert not held(2**40, wanted=False) and held(size, wanted=True) == size and not held(2**40, wanted=True, on=CPU)
    files = Source(Numbers(20), seed=3, batch_size=6)
    assert not trainer.bytes_to_hold(config, files, GPU)


def test_it_makes_room_for_a_step_that_runs_out_of_memory(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    state, said, there = TrainState.build(config), [], [True]
    step, calls = trainer.train_step, []

    def short(*arguments: Any) -> dict[str, torch.Tensor]:
        calls.append(state.config.micro_batch)
        if len(calls) <= 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(*arguments)

    monkeypatch.setattr(trainer, "train_step", short)
    x0, y = torch.zeros(6, 1, 8, 8), torch.zeros(6, dtype=torch.int64)
    trainer.step_in_memory(state, x0, y, said.append, lambda: bool(there) and there.pop())
    assert said == [
        "out of memory at step 1: again, with the samples in the memory of the host",
        "out of memory at step 1: again, in micro-batches of 3",
    ]
    assert calls == [0, 0, 3] and state.step == 1


def test_a_run_says_that_its_data_is_on_the_gpu(
    config: Config, pixels: InMemory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    """On a CPU that is taken for a GPU: the run ends with the weights of one that reads from the host."""
    ends = []
    for held in (False, True):
        monkeypatch.setattr(trainer, "bytes_to_hold", lambda *_, held=held: int(held))
        run = trainer.train(preset("digits", device="cpu", steps=3, batch_size=6, run_dir=str(tmp_path / str(held)),
            precision="fp32", **{"model.hidden_size": 16, "model.depth": 1, "model.num_heads": 2}))  # fmt: skip
        ends.append(np.concatenate([p.detach().numpy().ravel() for p in run.flow.parameters()]))
        assert ("all samples lie on the GPU, 0.00 GB" in capsys.readouterr().out) == held
    np.testing.assert_array_equal(*ends)
