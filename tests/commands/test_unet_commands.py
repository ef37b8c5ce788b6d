"""Runs of a U-Net by the command lines: trained, resumed, drawn, judged, given away, and what is refused."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from soflow_fast import OneStep, SolutionFlow, load_official, sample
from soflow_fast.errors import ConfigError
from soflow_fast.pipeline import SoFlowPipeline
from soflow_fast.runs.checkpoint import load
from tests import song_unet
from tests.unets import FIELDS

SMALL = [
    part
    for name, value in FIELDS.items()
    if name.startswith("model.")
    for part in ("--set", f"{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}")
]
SMALL = [*SMALL, "--batch-size", "8", "--device", "cpu"]


@pytest.fixture
def photographs(tmp_path: Any) -> Any:
    drawn = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    for k, pixels in enumerate(drawn):
        (tmp_path / "set" / "abc"[k % 3]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "set" / "abc"[k % 3] / f"{k}.png")
    return tmp_path / "set"


def test_a_run_from_images_to_samples(photographs: Any, call: Any, tmp_path: Any) -> None:
    run = tmp_path / "run"
    given = ("train", "cifar10-unet", "--data", photographs, "--run-dir", run, *SMALL)
    trained = call(*given, "--steps", "3")
    assert (trained.code, trained.err) == (0, "")
    assert "attention math" in trained.out and "sc " in trained.out
    values = json.loads((run / "config.json").read_text())
    assert values["model"]["kind"] == "unet" and values["model"]["multipliers"] == [1, 2]
    assert (values["quotient"], values["quotient_precision"]) == ("pair", "fp32")
    again = call(*given, "--steps", "5")
    assert again.code == 0 and "goes on" in again.out

    flow = load(run)
    assert flow.network.config.channels == 16 and not flow.network.training
    drawn = call("sample", run, "--out", tmp_path / "out", "--n", "3", "--device", "cpu")
    assert drawn.code == 0 and len(list((tmp_path / "out").glob("0*.png"))) == 3
    exported = tmp_path / "hub"
    assert call("export", run, exported, "--format", "hub").code == 0
    card = (exported / "README.md").read_text()
    assert "- unet" in card and "U-Net with levels of 16, 32 channels, blocks in each: 1" in card
    assert "--set model.channels=16" in card
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    other = SolutionFlow.from_pretrained(exported)
    assert torch.equal(sample(other, None, noise=[noise]), sample(flow, None, noise=[noise]))
    assert torch.equal(OneStep(other, precision="fp32")(noise), sample(flow, None, noise=[noise]))
    with pytest.raises(ConfigError, match="compile: is of the DiT's blocks"):
        OneStep(other, precision="fp32", compile=True)
    assert call("export", run, tmp_path / "pipeline", "--format", "diffusers").code == 0
    pipeline = SoFlowPipeline.from_pretrained(tmp_path / "pipeline")
    drawn = pipeline(latents=noise, num_images_per_label=2, output_type="pt").images
    wanted = (sample(flow, None, noise=[noise]) / 2 + 0.5).clamp(0, 1)
    assert drawn.shape == (2, 3, 8, 8) and (drawn - wanted).abs().max() <= 1 / 255
    line = call("export", run, tmp_path / "theirs", "--format", "authors")
    assert line.code == 2 and "a U-Net of theirs is read, but not written" in line.err


def test_samples_of_a_unet_are_judged(photographs: Any, call: Any, tmp_path: Any) -> None:
    file = tmp_path / "1.pt"
    torch.save({f"network.{name}": value for name, value in song_unet.random_weights().items()}, file)
    flags = ("--reference", photographs, "--n", "100", "--nfe", "1", "--metrics", "fd-random", "--device", "cpu")
    judged = call("evaluate", file, *flags, "--json")
    assert judged.code == 0 and json.loads(judged.out)["nfe"]["1"]["fd_random"] > 0


def test_what_a_run_needs_is_predicted(call: Any, tmp_path: Any) -> None:
    smaller = ("--set", "model.multipliers=1", "--set", "model.attention_sizes=0", "--batch-size", "2")
    given = ("train", "cifar10-unet", *SMALL, *smaller, "--run-dir", tmp_path / "run", "--dry-run")
    dry = call(*given, "--gpu", "h100")
    assert dry.code == 0 and "U-Net with levels of 16 channels" in dry.out
    assert "GB at its peak" in dry.out and "is predicted of a DiT alone" in dry.out and "attention" not in dry.out
    many = call(*given, "--gpus", "2")
    assert (many.code, many.err.count("\n")) == (2, 1) and "--gpus: predicts a step of a DiT" in many.err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--quotient", "increments"), "--quotient must be auto or pair with a U-Net"),
        (("--parallel", "fsdp"), "--parallel must be ddp"),
        (("--compile",), "--compile must be false with a U-Net"),
        (("--optimizer", "apex"), "--optimizer must be left at soflow with optim.kind radam"),
        (("--set", "model.depth=2"), "unknown field 'model.depth' of a network of the kind unet"),
        (("--guidance-range", "1,4"), "of a network of the kind unet"),
    ],
)
def test_what_it_has_not_is_one_line(flags: tuple[str, ...], said: str, call: Any, tmp_path: Any) -> None:
    refused = call("train", "cifar10-unet", *SMALL, "--run-dir", tmp_path / "run", *flags)
    assert (refused.code, refused.err.count("\n")) == (2, 1) and said in refused.err


def test_a_file_of_the_authors_is_drawn_and_begun_with(photographs: Any, call: Any, tmp_path: Any) -> None:
    weights = {f"network.{name}": value for name, value in song_unet.random_weights().items()}
    file = tmp_path / "800000.pt"
    torch.save({"model": weights, "ema_model": weights, "finished_steps": 800_000}, file)
    assert call("sample", file, "--out", tmp_path / "out", "--n", "2", "--device", "cpu").code == 0
    given = ("train", "cifar10-unet", "--data", photographs, *SMALL, "--steps", "1", "--set", "optim.lr=1e-30")
    begun = call(*given, "--run-dir", tmp_path / "run", "--init", file)
    assert (begun.code, begun.err) == (0, "")
    theirs, ours = load_official(file).state_dict(), load(tmp_path / "run").state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    refused = call(*given, "--run-dir", tmp_path / "other", "--resume-official", file)
    assert refused.code == 2 and "a U-Net's moments are not taken over; begin with its weights, --init" in refused.err
    refused = call("train", "digits", "--device", "cpu", "--run-dir", tmp_path / "third", "--init", file)
    assert refused.code == 2 and "holds a U-Net, the configuration is a DiT's" in refused.err
