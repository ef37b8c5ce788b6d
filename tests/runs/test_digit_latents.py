"""`train digits --latent`: a VAE that is trained first, latents of it, a training on them, images again."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")

from soflow_fast.config.presets import preset
from soflow_fast.config.schema import Config
from soflow_fast.data.digits import load_digits
from soflow_fast.evaluation import frechet_distance
from soflow_fast.runs.latents import digits as digit_latents
from soflow_fast.runs.latents.vae import load_vae

Call = Any
CPU = torch.device("cpu")
SMALL = ["model.hidden_size=16", "model.depth=1", "model.num_heads=2", "run.sample_every=0"]
FLAGS = [
    *("digits", "--latent", "--device", "cpu", "--precision", "fp32", "--batch-size", "8", "--steps", "4"),
    *(f"--set={setting}" for setting in SMALL),
]


def silent(text: str) -> None:
    """Say nothing."""


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(digit_latents.train_vae, "__defaults__", (3,))


@pytest.fixture
def config() -> Config:
    return preset("digits-latent", device="cpu", run_dir="run")


def test_the_whole_way(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = call("train", *FLAGS)
    assert (trained.code, trained.err) == (0, "")
    assert "training a VAE on the digits, 3 steps" in trained.out
    assert "1797 samples of 4 x 4 x 4\n  10 classes: 0 178, 1 182" in trained.out
    assert "1 step : " in trained.out and "classified as their label" in trained.out
    with Image.open("runs/digits-latent/samples/final.png") as grid:
        assert grid.mode == "L"
    figures = json.loads(Path("runs/digits-latent/evaluation.json").read_text())
    monkeypatch.setattr(digit_latents, "train_vae", lambda *_: pytest.fail("there is a VAE already"))
    again = call("train", *FLAGS)
    assert again.code == 0 and "resuming runs/digits-latent at step 4 of 4" in again.out
    measured = call("evaluate", "runs/digits-latent", "--n", "4000", "--nfe", "1", "--device", "cpu", "--json")
    assert json.loads(measured.out)["nfe"]["1"] == pytest.approx(figures["nfe"]["1"])
    drawn = call("sample", "runs/digits-latent", "--out", "out", "--n", "1", "--labels", "7")
    assert drawn.code == 0 and drawn.out.startswith("classes: 7\n") and Path("out/00000.png").exists()


def test_latents_are_normalised_and_decode_to_their_digit(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    from soflow_fast.data import open_source

    monkeypatch.setattr(digit_latents.train_vae, "__defaults__", (60,))
    config = digit_latents.prepare(config, silent)
    source = open_source(config)
    index = torch.arange(len(source))
    x = source.dataset.decoded(source.dataset.read(index), torch.randn)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(4), atol=0.05, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(4), atol=0.05, rtol=0)
    images, labels = load_digits()
    assert torch.equal(source.dataset.labels, labels)
    vae, space = load_vae("run-data/vae", CPU, local=True), source.dataset.contents.space
    assert space is not None
    error = (vae.decoded(x, space) - images).square().mean()
    assert error < 0.5 * images.var()  # after 60 steps of 1000; 0.32 was seen


def test_a_vae_is_a_function_of_its_seed() -> None:
    one, same, other = (digit_latents.train_vae(seed, CPU, silent).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert not all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_kill_after_the_vae_keeps_it(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(Exception):
        pass

    def killed(*arguments: object, **settings: object) -> None:
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(digit_latents, "encode", killed)
        digit_latents.prepare(config, silent)
    before = Path("run-data/vae/diffusion_pytorch_model.safetensors").read_bytes()
    monkeypatch.setattr(digit_latents, "train_vae", lambda *_: pytest.fail("there is a VAE already"))
    assert digit_latents.prepare(config, silent).data.path == "run-data"
    assert Path("run-data/vae/diffusion_pytorch_model.safetensors").read_bytes() == before
    assert np.load("run-data/latents/shard-00000.npy").shape == (1797, 8, 4, 4)


def test_what_is_refused(call: Call) -> None:
    for arguments in (("cifar10", "--latent"), ("--config", "some.json", "--latent")):
        refused = call("train", *arguments)
        assert refused.code == 2 and "--latent: is of the digits, not of" in refused.err
    Path("other").mkdir()
    Path("other/latents").touch()
    refused = call("train", *FLAGS, "--data", "other")
    assert refused.code == 2 and "other/latents" in refused.err and refused.err.count("\n") == 1
    assert call("train", *FLAGS, "--dry-run").code == 0 and not Path("runs").exists()


@pytest.mark.slow
def test_a_vae_gives_the_digits_back() -> None:
    images, _ = load_digits()
    model = digit_latents.train_vae(0, CPU, silent, 400)
    with torch.no_grad():
        back = model.decode(model.encode(images).latent_dist.mean).sample
    assert (back - images).square().mean() < 0.02  # 0.013 was seen
    pixels = [(8 * (x + 1)).clamp(0, 16).flatten(1).numpy() for x in (back, images)]
    assert frechet_distance(*pixels) < 16  # as two halves of the digits have it; 12.7 was seen
