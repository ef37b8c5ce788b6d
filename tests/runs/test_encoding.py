"""Encoding by several devices and processes: the same bytes, whoever works, and an end whatever becomes of them."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from soflow_fast.data import latents
from soflow_fast.data.dataset import Contents, Dataset, LatentSpace, Wanted
from soflow_fast.data.latents import writer
from soflow_fast.errors import ConfigError, DataError, Interrupted
from soflow_fast.runs.latents import encoding

CPU = torch.device("cpu")
N, SIZE = 26, 8
Call = Callable[..., Any]


class Pixels(Dataset):
    """Images of their number, and which processes have read them, as files of a folder."""

    def __init__(self, told: Path, killed: int = N, bad: int = N) -> None:
        self.told, self.killed, self.bad = told, killed, bad
        self.labels, self.shape = torch.arange(N) % 3, (3, SIZE, SIZE)
        self.contents = Contents("numbers", ("a", "b", "c"), checksum="numbers")

    def read(self, index: Tensor, mirrored: Tensor | None = None) -> Tensor:
        (self.told / str(os.getpid())).touch()
        if self.killed in index:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.bad in index:
            raise DataError(f"--data x: {self.bad} is damaged")
        position = torch.arange(3 * SIZE * SIZE).view(3, SIZE, SIZE)
        return ((position * 7 + index.view(-1, 1, 1, 1) * 31) % 256).to(torch.uint8)


class Model(torch.nn.Module):
    """In the place of an AutoencoderKL; `before` is called with the images that are to be encoded."""

    def __init__(self, before: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.before, self.config = before, SimpleNamespace(in_channels=3, block_out_channels=(8, 8))
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(8, 3, 2, 2, generator=generator), requires_grad=False)

    def decode(self, z: Tensor) -> Any:
        self.before(z)
        return SimpleNamespace(sample=z)

    def encode(self, x: Tensor) -> Any:
        self.before(x)
        mean, std = torch.nn.functional.conv2d(x, self.weight, stride=2).chunk(2, 1)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=std.exp()))


def vae(before: Callable[[Tensor], object] = lambda x: None) -> encoding.VAE:
    return encoding.VAE("a", Model(before), 0.5, 0.0, "weights")


@pytest.fixture(autouse=True)
def shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 10, so that batches of 3 are of 3, 3, 3, 1."""
    monkeypatch.setattr(encoding, "shard_rows", lambda count, row: 10)


@pytest.fixture
def encode(tmp_path: Path) -> Call:
    (tmp_path / "told").mkdir()

    def encode(
        name: str,
        devices: int | list[torch.device] = 1,
        workers: int = 0,
        encoder: encoding.VAE | None = None,
        **bad: int,
    ) -> Path:
        images, out = Pixels(tmp_path / "told", **bad), tmp_path / name
        settings: dict[str, Any] = {"size": SIZE, "flip": True, "batch_size": 3, "workers": workers}
        devices = [CPU] * devices if isinstance(devices, int) else devices
        encoding.encode(images, out, encoder or vae(), devices=devices, **settings)
        return out

    return encode


def at_work() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("device-")]


def whole_shards(out: Path) -> bool:
    """Whether nothing of a shard is left that is not whole."""
    return out.is_dir() and not [*out.glob(".*.partial*")]


@pytest.mark.parametrize(("devices", "workers"), [(2, 0), (3, 0), (1, 2), (3, 2)])
def test_the_bytes_are_the_same_whoever_works(
    encode: Call, tmp_path: Path, files: Call, devices: int, workers: int
) -> None:
    whole = files(encode("whole"))
    (tmp_path / "told" / str(os.getpid())).unlink()
    threads = set()
    found = encode("found", devices, workers, vae(lambda x: threads.add(threading.current_thread().name)))
    assert files(found) == whole and len(whole) == 3 * 3 + 2
    assert threads == {threading.main_thread().name, *(f"device-{k}_0" for k in range(devices))}  # the first image
    others = {int(path.name) for path in (tmp_path / "told").iterdir()} - {os.getpid()}
    assert (1 <= len(others) <= workers) if workers else not others
    assert not at_work() and not any(Path(f"/proc/{pid}").exists() for pid in others)


def test_vectors_go_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "told").mkdir()
    values = torch.randn(N, 5, generator=torch.Generator().manual_seed(0)).half()
    np.save(tmp_path / "v.npy", values.numpy())
    images, said = Pixels(tmp_path / "told"), []
    encoding.take_conditions(images, "", str(tmp_path / "v.npy"), said.append)
    assert said == ["conditions: vectors of 5 numbers, float16, from v.npy"]
    settings: dict[str, Any] = {"size": SIZE, "flip": False, "batch_size": 9, "workers": 0, "devices": [CPU]}
    encoding.encode(images, tmp_path / "out", vae(), **settings)
    found = latents.load(tmp_path / "out", Wanted(0, 0))
    encoding.take_conditions(found, str(tmp_path / "out"), "", said.append)
    assert torch.equal(found.given(torch.arange(N)), values)
    encoding.convert(found, tmp_path / "again")
    again = latents.load(tmp_path / "again", Wanted(0, 0))
    encoding.take_conditions(again, str(tmp_path / "again"), "", said.append)
    assert again.conditions is not None and again.conditions.checksum == found.contents.conditions != ""
    images.conditions = None
    with pytest.raises(DataError, match="is written with other conditions, or without"):
        encoding.encode(images, tmp_path / "out", vae(), **settings)


@pytest.mark.parametrize("killed", [1, 5, 9])
def test_others_go_on_to_the_same_bytes(
    encode: Call, tmp_path: Path, files: Call, monkeypatch: pytest.MonkeyPatch, killed: int
) -> None:
    whole, real, appended = files(encode("whole")), writer.Writer.append, []

    def append(self: writer.Writer, *arguments: Any) -> None:
        if len(appended) == killed:
            raise KeyError("killed")
        appended.append(1)
        real(self, *arguments)

    monkeypatch.setattr(writer.Writer, "append", append)
    with pytest.raises(KeyError, match="killed"):
        encode("again", 2, 2)
    assert not at_work() and whole_shards(tmp_path / "again")
    monkeypatch.setattr(writer.Writer, "append", real)
    assert files(encode("again", 3, 1)) == whole
    begun = []
    assert files(encode("again", 3, 1, vae(begun.append))) == whole
    assert len(begun) == 4  # of the first image and of a few that are there, with their twins


def test_memory_that_runs_out_on_one_device_ends_all(encode: Call, tmp_path: Path, files: Call) -> None:
    calls = []

    def before(x: Tensor) -> None:
        calls.append(threading.current_thread().name)
        if calls[-1] == "device-1_0" and len([name for name in calls if name == "device-1_0"]) == 5:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    with pytest.raises(ConfigError, match=r"^--batch-size 3: out of memory; give a smaller one$"):
        encode("out", 3, 2, vae(before))
    assert not at_work() and whole_shards(tmp_path / "out") and (tmp_path / "out" / "shard-00000.npy").exists()
    assert files(encode("out", 2)) == files(encode("whole"))


def test_an_image_that_cannot_be_read_is_named(encode: Call, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^--data x: 14 is damaged$"):
        encode("out", 2, 2, bad=14)
    assert not at_work() and whole_shards(tmp_path / "out")


def test_a_worker_that_is_killed_ends_all(encode: Call, tmp_path: Path, files: Call) -> None:
    with pytest.raises(DataError, match=r"^--workers 2: one of them was killed, .*; give fewer$"):
        encode("out", 2, 2, killed=14)
    assert not at_work() and whole_shards(tmp_path / "out")
    assert files(encode("out", 1)) == files(encode("whole"))


def test_a_signal_waits_for_no_batch(
    encode: Call, tmp_path: Path, files: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One device is in the midst of a batch for as long as this test likes."""
    stuck, go_on, real = threading.Event(), threading.Event(), writer.Writer.append

    def before(x: Tensor) -> None:
        if threading.current_thread().name == "device-1_0":
            stuck.set()
            go_on.wait(60)
        elif threading.current_thread().name == "device-0_0":  # has nothing to write before that
            assert stuck.wait(60)

    def append(self: writer.Writer, *arguments: Any) -> None:
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(writer.Writer, "append", append)
    began = time.monotonic()
    with pytest.raises(Interrupted, match="0 of 26 are kept, and the same command goes on") as error:
        encode("out", 2, 2, vae(before))
    assert at_work() and time.monotonic() - began < 30
    assert error.value.at_once and error.value.exit_code == 143 and whole_shards(tmp_path / "out")
    go_on.set()
    monkeypatch.setattr(writer.Writer, "append", real)
    assert files(encode("out", 2)) == files(encode("whole"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_bytes_of_a_gpu_are_the_same_by_several_threads(encode: Call, files: Call) -> None:
    gpu = torch.device("cuda", torch.cuda.current_device())
    gpus = [torch.device("cuda", k) for k in range(torch.cuda.device_count())]
    whole = files(encode("whole", [gpu]))
    assert files(encode("twice", [gpu, gpu], 2)) == files(encode("all", gpus, 2)) == whole


def test_a_vae_on_another_device_is_a_copy() -> None:
    here = vae()
    there = here.on(torch.device("meta"))
    assert here.on(CPU) is here and here.model.weight.device == CPU and there.model.weight.device.type == "meta"
    assert (there.name, there.scale, there.weights) == (here.name, here.scale, here.weights)


@pytest.mark.parametrize("n", [1, 16, 21])
def test_as_many_latents_are_decoded_at_a_time_however_many_there_are(n: int) -> None:
    """Another number could round differently."""
    given: list[int] = []
    x = torch.randn(n, 4, 2, 2)
    found = vae(lambda z: given.append(len(z))).decoded(x, LatentSpace("a", 0.5, 0.25))
    assert torch.equal(found, x / 0.5 + 0.25) and given == [16] * -(-n // 16)
