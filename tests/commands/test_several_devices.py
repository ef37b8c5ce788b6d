"""`sample` and `evaluate` on several devices: the same bytes as on one, and an end whatever becomes of one of them."""

import importlib
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from soflow_fast import load, sample
from soflow_fast import train as train_command
from soflow_fast.config.presets import preset
from soflow_fast.errors import ConfigError, Interrupted
from soflow_fast.runs import checkpoint, images, signals
from soflow_fast.sampling import Drawing
from soflow_fast.training import precision
from soflow_fast.training.state import build_flow

CPU = torch.device("cpu")
Call = Callable[..., Any]


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], set[str]]:
    """`devices(n)`: that many of them from now on; returns the names of the threads in which batches are drawn."""
    threads: set[str] = set()
    real = Drawing.batch

    def batch(self: Drawing, *arguments: Any) -> torch.Tensor:
        threads.add(threading.current_thread().name)
        return real(self, *arguments)

    def several(n: int) -> set[str]:
        threads.clear()
        monkeypatch.setattr(precision, "resolve_devices", lambda names: [CPU] * n)
        return threads

    monkeypatch.setattr(Drawing, "batch", batch)
    return several


def at_work() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("device-")]


def test_images_are_the_same_on_any_number_of_devices(
    finished: Any, call: Call, files: Call, tmp_path: Path, devices: Callable[[int], set[str]]
) -> None:
    drawn = {}
    for n in (1, 2, 3):
        threads = devices(n)
        flags = ["--n", "150", "--nfe", "2", "--labels", "3,5,null", "--seed", "7"]  # batches of 64, 64 and 22
        result = call("sample", finished.folder, "--out", tmp_path / str(n), *flags)
        assert (result.code, result.err) == (0, "") and not at_work()
        assert threads == {f"device-{k}_0" for k in range(n)}
        drawn[n] = files(tmp_path / str(n))
    assert drawn[1] == drawn[2] == drawn[3] and len(drawn[1]) == 153
    labels = torch.tensor([3, 5, 10]).repeat(50)
    alone = images.to_uint8(sample(load(finished.folder), labels, nfe=2, seed=7))
    assert [images.png(image) for image in alone] == [drawn[3][f"{i:05d}.png"] for i in range(150)]


@pytest.fixture(scope="module")
def latent_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model of latents with weights of chance, and a tiny VAE beside it."""
    diffusers = pytest.importorskip("diffusers")
    place = tmp_path_factory.mktemp("latents")
    sizes = {"model.hidden_size": 16, "model.depth": 1, "model.num_heads": 2, "model.input_size": 4}
    config = preset("imagenet256-b2", **sizes)
    flow = build_flow(config).to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for value in flow.state_dict().values():
            value.normal_(std=0.3)
        vae = diffusers.AutoencoderKL(
            block_out_channels=(4, 4),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=2,
        )
    checkpoint.export(flow, config, place / "run")
    vae.save_pretrained(place / "vae")
    return place


@pytest.mark.parametrize("vae", ["vae", "none"])
def test_latents_are_decoded_where_they_are_drawn(
    vae: str, latent_run: Path, call: Call, files: Call, tmp_path: Path, devices: Callable[[int], set[str]]
) -> None:
    drawn = {}
    for n, count in ((1, 135), (2, 135), (3, 130)):
        devices(n)
        name = vae if vae == "none" else latent_run / vae
        result = call("sample", latent_run / "run", "--out", tmp_path / str(n), "--n", count, "--vae", name)
        assert (result.code, result.err) == (0, ""), result
        drawn[n] = files(tmp_path / str(n))
    assert drawn[1] == drawn[2] and len(drawn[1]) == 137 + (vae == "vae")
    few = {name: content for name, content in drawn[3].items() if name[0] == "0"}
    assert few.items() <= drawn[1].items() and len(few) == len(set(few.values())) == 130


def test_figures_are_the_same_on_any_number_of_devices(
    finished: Any, call: Call, devices: Callable[[int], set[str]]
) -> None:
    said = []
    for n in (1, 2, 3):
        threads = devices(n)
        result = call("evaluate", finished.folder, "--n", "150", "--nfe", "1,2", "--json")
        assert (result.code, result.err) == (0, "") and len(threads) == n and not at_work()
        said.append(result.out)
    assert said[0] == said[1] == said[2]


@pytest.mark.parametrize("module", ["sample", "evaluate"])
def test_memory_that_runs_out_on_one_device_ends_all(
    module: str, finished: Any, refused: Call, tmp_path: Path, devices: Callable[[int], set[str]], monkeypatch: Any
) -> None:
    devices(3)
    real = Drawing.batch

    def batch(self: Drawing, *arguments: Any) -> torch.Tensor:
        if threading.current_thread().name == "device-1_0":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, *arguments)

    monkeypatch.setattr(Drawing, "batch", batch)
    out = tmp_path / "out"
    line = refused(module, finished.folder, "--n", "300", *(["--out", out] if module == "sample" else []))
    assert ("--batch-size 64" if module == "sample" else "--n 300") + ": out of memory with" in line
    assert not [*tmp_path.rglob("*partial*")] and not at_work()


def test_a_signal_waits_for_no_device(
    finished: Any, tmp_path: Path, devices: Callable[[int], set[str]], monkeypatch: Any
) -> None:
    """One device is in the midst of a batch for as long as this test likes."""
    from soflow_fast.sample import main

    devices(2)
    go_on, real = threading.Event(), Drawing.batch

    def batch(self: Drawing, *arguments: Any) -> torch.Tensor:
        if threading.current_thread().name == "device-1_0":
            os.kill(os.getpid(), signal.SIGTERM)
            go_on.wait(60)
        return real(self, *arguments)

    def stop(number: int, frame: Any) -> None:
        raise Interrupted(number)

    monkeypatch.setattr(Drawing, "batch", batch)
    began, before = time.monotonic(), signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(Interrupted) as error:
            main([str(finished.folder), "--out", str(tmp_path / "out"), "--n", "300"])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert error.value.at_once and at_work() and time.monotonic() - began < 30
    assert re.fullmatch(r"interrupted; \d+ of 300 are kept, and the same command goes on", str(error.value))
    assert not [*tmp_path.rglob("*partial*")]
    go_on.set()
    while at_work():
        time.sleep(0.001)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_images_of_a_gpu_are_the_same_by_several_threads(
    finished: Any, call: Call, files: Call, tmp_path: Path, monkeypatch: Any
) -> None:
    gpu = torch.device("cuda", torch.cuda.current_device())
    gpus = [torch.device("cuda", k) for k in range(torch.cuda.device_count())]
    for name, several in {"one": [gpu], "two": [gpu, gpu], "all": gpus}.items():
        monkeypatch.setattr(precision, "resolve_devices", lambda names, several=several: several)
        assert call("sample", finished.folder, "--out", tmp_path / name, "--n", "300", "--nfe", "2").code == 0
    assert files(tmp_path / "one") == files(tmp_path / "two") == files(tmp_path / "all")


@pytest.mark.parametrize("flag", ["--dry-run", "--env"])
def test_what_is_of_one_process_is_refused_among_several(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match=f"^train {flag} speaks of one machine"):
        train_command.main([flag])


@pytest.mark.parametrize("module", ["sample", "evaluate", "encode"])
def test_several_processes_are_refused_by_the_first(
    module: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = importlib.import_module(f"soflow_fast.{module}").main
    given = {"sample": ["run", "--out", "out"], "evaluate": ["run"], "encode": ["in", "out"]}[module]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in ((0, f"{module} takes every GPU of a machine by itself: start one process, not 2 by"), (1, "")):
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(ConfigError) as error:
            main(given)
        assert str(error.value) == (f"{said} torchrun or srun" if said else "")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    alone = call(module, *given)
    assert alone.code == 2 and alone.err and "every GPU" not in alone.err


def test_a_rank_that_is_refused_leaves_signals_as_they_were(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each counts, though one that comes again counts once among ranks."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    before = signal.getsignal(signal.SIGTERM)
    came: list[int] = []
    try:
        assert call("train", "--env").code == 2
        signals.watch(came.append)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        assert came == [signal.SIGTERM] * 2
    finally:
        signals.forget()
        signal.signal(signal.SIGTERM, before)


def test_of_several_processes_one_says_that_they_are_refused(
    start: Call, tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = []
    for rank in range(2):
        for name, value in {"RANK": rank, "WORLD_SIZE": 2}.items():
            monkeypatch.setitem(environment, name, str(value))
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        ranks.append(start("sample", "run", "--out", "out", cwd=tmp_path, text=True, **pipes))
    ended = [(*rank.communicate(timeout=300), rank.returncode) for rank in ranks]
    line = "soflow: error: sample takes every GPU of a machine by itself: start one process, not 2 by torchrun or srun"
    assert ended == [("", f"{line}\n", 2), ("", "", 2)] and not [*tmp_path.iterdir()]
