"""What a run and its data have to do with each other, from the command line: identity, classes, epochs, more steps,
weights to begin with, and data that goes bad on the way."""

import json
import os
import shutil
import signal
import subprocess
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from soflow_fast.commands.labels import parsed_labels

Call = Any
SIZES = ["model.hidden_size=16", "model.depth=1", "model.num_heads=2", "model.patch_size=4", "model.input_size=8"]
QUIET = ["run.sample_every=0", "run.log_every=1", "run.check_quotient_every=0"]
FLAGS = [
    *("cifar10", "--device", "cpu", "--precision", "fp32", "--batch-size", "4", "--checkpoint-every", "2"),
    *(
        f"--set={setting}"
        for setting in [*SIZES, "run.sample_every=0", "run.log_every=1", "run.check_quotient_every=0"]
    ),
]


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve photographs of 8 x 8 in three classes of four."""
    draw = np.random.default_rng(0)
    for name in ("2", "10", "bee"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for k in range(4):
            pixels = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{k}.png")
    (tmp_path / "photos" / "2" / "notes.txt").write_text("x")
    return tmp_path / "photos"


def test_a_run_takes_the_classes_of_its_data_and_draws_them_by_name(photos: Path, call: Call) -> None:
    result = call("train", *FLAGS, "--steps", "2", "--data", photos, "--run-dir", "run")
    assert (result.code, result.err) == (0, "")
    assert "data: folder of images at" in result.out and "3 classes: 2 4, 10 4, bee 4" in result.out
    assert "left out: 1 .txt" in result.out
    kept = json.loads(Path("run/data.json").read_text())
    assert kept["classes"] == ["2", "10", "bee"] and kept["count"] == 12
    assert json.loads(Path("run/checkpoints/step-00000002/data.json").read_text()) == kept
    for labels, said in (("bee", "bee"), ("10,null", "10, null"), ("0,2", "2")):
        drawn = call("sample", "run", "--out", f"out {labels}", "--n", "2", "--labels", labels)
        assert (drawn.code, drawn.err) == (0, "") and drawn.out.startswith(f"classes: {said}\n")
    wrong = call("sample", "run", "--out", "out", "--labels", "bees")
    assert wrong.code == 2 and "--labels bees: no class of this run (did you mean 'bee'?)" in wrong.err


def test_all_that_is_bad_is_listed_in_the_run(photos: Path, call: Call) -> None:
    for k in range(30):
        (photos / "bee" / f"bad{k:02}.png").write_bytes(b"junk")
    run = ["train", *FLAGS, "--steps", "2", "--data", photos, "--run-dir", "run"]
    assert call(*run).code == 2
    result = call(*run, "--skip-bad")
    assert (result.code, result.err) == (0, "") and "all that are bad: run/left-out.txt" in result.out
    lines = Path("run/left-out.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == [f"bee/bad{k:02}.png" for k in range(30)]
    assert all("is no readable image" in line for line in lines)
    for bad in (photos / "bee").glob("bad*"):
        bad.unlink()
    assert call(*run[:-6], "--steps", "3", *run[-4:]).code == 0 and not Path("run/left-out.txt").exists()


def test_null_is_the_null_label_and_names_may_begin_with_a_space() -> None:
    """A class that is called null is reached by its number."""
    names = ("10", " bee ", "null", "2")
    for text, label in (("null", 4), (" null", 4), (" bee ", 1), ("10", 0), (" 10 ", 0), ("2", 3), ("1", 1)):
        assert parsed_labels(text, 4, names) == [label], text
    assert parsed_labels("2, bee ,null", 4, names) == [3, 1, 4]
    assert parsed_labels("2,null", 3, names[:3]) == [2, 3]


def test_labels_by_name_are_those_by_number(photos: Path, call: Call) -> None:
    call("train", *FLAGS, "--steps", "2", "--data", photos, "--run-dir", "run")
    for labels in ("10", "1"):
        call("sample", "run", "--out", labels, "--n", "1", "--labels", labels)
    assert Path("10/00000.png").read_bytes() == Path("1/00000.png").read_bytes()


def test_a_number_of_classes_that_is_set_must_be_the_datas(photos: Path, call: Call) -> None:
    wrong = call("train", *FLAGS, "--set=model.num_classes=4", "--data", photos, "--run-dir", "run")
    assert wrong.code == 2 and "the data has 3 classes, the model 4" in wrong.err
    none = call("train", *FLAGS, "--set=model.num_classes=0", "--steps", "1", "--data", photos, "--run-dir", "run")
    assert none.code == 0


def test_the_same_data_elsewhere_resumes_and_other_data_is_refused(photos: Path, call: Call) -> None:
    run = ["train", *FLAGS, "--run-dir", "run"]
    assert call(*run, "--steps", "2", "--data", photos).code == 0
    moved = shutil.copytree(photos, "elsewhere")
    with zipfile.ZipFile("set.zip", "w") as archive:
        for file in sorted(Path(moved).rglob("*.png")):
            archive.write(file, file.relative_to(moved))
    for step, place in ((4, "elsewhere"), (6, "set.zip")):
        result = call(*run, "--steps", str(step), "--data", place)
        assert (result.code, result.err) == (0, "") and f"resuming run at step {step - 2} of {step}" in result.out
        assert f"finished at step {step - 2}, goes on: all schedules now end at step {step}" in result.out
    Path("elsewhere/bee/3.png").unlink()
    refused = call(*run, "--steps", "8", "--data", "elsewhere")
    assert refused.code == 2 and "12 samples -> 11" in refused.err and "bee: 4 -> 3" in refused.err
    Path("run/data.json").unlink()  # the checkpoints know it too
    again = call(*run, "--steps", "8", "--data", "elsewhere")
    assert again.code == 2 and "of a run on other data (12 samples -> 11" in again.err


def test_fewer_steps_or_more_of_an_unfinished_run_are_another_run(photos: Path, call: Call) -> None:
    run = ["train", *FLAGS, "--run-dir", "run", "--data", photos]
    assert call(*run, "--steps", "4").code == 0
    fewer = call(*run, "--steps", "3")
    assert fewer.code == 2 and "steps: 4 -> 3" in fewer.err
    shutil.rmtree("run/checkpoints/step-00000004")
    more = call(*run, "--steps", "6")
    assert more.code == 2 and "steps: 4 -> 6" in more.err


def test_epochs_are_steps(photos: Path, call: Call) -> None:
    result = call("train", *FLAGS, "--epochs", "2", "--data", photos, "--run-dir", "run")
    assert result.code == 0 and "6 steps of 4" in result.out
    again = call("train", *FLAGS, "--epochs", "2", "--data", photos, "--run-dir", "run")
    assert again.code == 0 and "resuming run at step 6 of 6" in again.out


def test_a_run_begins_with_the_weights_of_another(photos: Path, call: Call) -> None:
    run = ["train", *FLAGS, "--data", photos]
    assert call(*run, "--steps", "4", "--run-dir", "first").code == 0
    settings = ["--set=optim.lr=1e-20", "--set=optim.warmup_steps=0", "--set=optim.ema_decay=0"]
    assert call(*run, "--steps", "1", "--run-dir", "second", "--init", "first", *settings).code == 0
    from soflow_fast import load

    for a, b in zip(load("first").parameters(), load("second").parameters(), strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=0, atol=1e-12)
    # A file as the authors' trainer writes it, of wrapped modules and with an average.
    weights = {f"module.{name}": value for name, value in load("first").state_dict().items()}
    torch.save({"model": {name: value + 1 for name, value in weights.items()}, "ema": weights, "step": 4}, "theirs.pt")
    assert call(*run, "--steps", "1", "--run-dir", "fourth", "--init", "theirs.pt", *settings).code == 0
    for a, b in zip(load("first").parameters(), load("fourth").parameters(), strict=True):  # an average of no memory
        np.testing.assert_allclose(a.numpy() + 1, b.numpy(), rtol=0, atol=1e-6)
    lasting = [*settings[:-1], "--set=optim.ema_decay=0.75", "--set=optim.ema_warmup=false"]
    assert call(*run, "--steps", "1", "--run-dir", "sixth", "--init", "theirs.pt", *lasting).code == 0
    for a, b in zip(load("first").parameters(), load("sixth").parameters(), strict=True):
        np.testing.assert_allclose(a.numpy() + 0.25, b.numpy(), rtol=0, atol=1e-6)
    wrong = call(*run, "--run-dir", "fifth", "--init", "theirs.pt", "--set=model.hidden_size=32")
    assert wrong.code == 2 and "--init theirs.pt: network." in wrong.err and "the model's is" in wrong.err
    wrong = call(*run, "--run-dir", "fifth", "--init", "photos/2/notes.txt")
    assert wrong.code == 2 and "--init photos/2/notes.txt: not a checkpoint" in wrong.err
    wrong = call(*run, "--run-dir", "third", "--init", "first", "--set=model.depth=2")
    assert wrong.code == 2 and "--init first: of another network: model.depth differs" in wrong.err


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_changes_during_the_run_ends_it_with_all_saved(
    workers: int, photos: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    from soflow_fast.runs import trainer

    plain = trainer.step_in_memory

    def damaging(state: Any, *given: Any) -> Any:
        if state.step == 2:
            for file in photos.rglob("*.png"):
                file.write_bytes(b"gone bad")
        return plain(state, *given)

    monkeypatch.setattr(trainer, "step_in_memory", damaging)
    settings = ["--checkpoint-every", "1000", f"--set=run.workers={workers}"]
    result = call("train", *FLAGS, "--steps", "50", "--data", photos, "--run-dir", "run", *settings)
    assert result.code == 2 and result.err.count("\n") == 1 and f"--data {photos}: " in result.err
    saved = sorted(path.name for path in Path("run/checkpoints").iterdir())
    assert len(saved) == 1 and 3 <= int(saved[0][-8:]) < 10


@pytest.mark.slow
def test_a_sigterm_to_all_processes_of_a_run_leaves_those_that_read_in_place(photos: Path, start: Any) -> None:
    """As of Slurm, systemd and `timeout`: the run saves, and is not ended for a process that reads."""
    flags = [*FLAGS, "--steps", "100000", "--checkpoint-every", "100000", "--set=run.workers=2"]
    training = start(
        *("train", *flags, "--data", photos, "--run-dir", "run"),
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True},
    )
    try:
        said = iter(training.stdout.readline, "")
        assert any(line.startswith("step ") for line in said)
        readers = Path(f"/proc/{training.pid}/task/{training.pid}/children").read_text().split()
        assert len(readers) >= 2
        for pid in map(int, readers):  # they may well be the first
            os.kill(pid, signal.SIGTERM)
        time.sleep(1)
        training.send_signal(signal.SIGTERM)
        _, err = training.communicate(timeout=60)
    finally:
        training.kill()
    assert training.returncode == 143 and "stopped and saved" in err
    assert len(list(Path("run/checkpoints").iterdir())) == 1


LATENTS = [
    "model.hidden_size=16",
    "model.depth=1",
    "model.num_heads=2",
    "model.input_size=4",
    "model.num_classes=3",
]


ON_LATENTS = [
    *("train", "imagenet256-b2", "--device", "cpu", "--precision", "fp32", "--batch-size", "4"),
    *(f"--set={setting}" for setting in [*LATENTS, *QUIET]),
]


def hdf5(path: str, count: int = 40, **rows: float) -> None:
    """Latents as the authors keep them. rows: r39=0.5 fills row 39 with that."""
    h5py = pytest.importorskip("h5py")
    latents = np.random.default_rng(0).random((count, 8, 4, 4), np.float32)
    for name, value in rows.items():
        latents[int(name[1:])] = value
    with h5py.File(path, "w") as file:
        file["latents"], file["labels"] = latents, np.arange(count) % 3


def safetensors(path: str) -> None:
    save_file({"latents": torch.rand(40, 4, 4, 4), "labels": torch.arange(40) % 3}, path)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("write", [hdf5, safetensors])
def test_latents_of_others_that_are_cut_off_end_the_run_with_all_saved(
    write: Call, workers: int, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    from soflow_fast.runs import trainer

    place = f"a.{write.__name__}"
    write(place)
    plain = trainer.step_in_memory

    def damaging(state: Any, *given: Any) -> Any:
        if state.step == 2:
            os.truncate(place, 3000)
        return plain(state, *given)

    monkeypatch.setattr(trainer, "step_in_memory", damaging)
    settings = ["--steps", "50", "--checkpoint-every", "1000", f"--set=run.workers={workers}"]
    result = call(*ON_LATENTS, *settings, "--data", place, "--run-dir", "run")
    assert result.code == 2 and result.err.count("\n") == 1
    assert f"--data {place}: {place} has changed during the run" in result.err
    saved = sorted(path.name for path in Path("run/checkpoints").iterdir())
    assert len(saved) == 1 and 3 <= int(saved[0][-8:]) < 10


def test_latents_that_are_not_finite_end_the_run_with_all_saved(call: Call) -> None:
    looked_at = set((torch.arange(64) * 65 // 63).tolist())
    bad = next(row for row in range(66) if row not in looked_at)  # by the identity, at the start
    hdf5("a.hdf5", 66, **{f"r{bad}": float("nan")})
    settings = ["--steps", "50", "--checkpoint-every", "1000", "--set=run.workers=0"]
    result = call(*ON_LATENTS, *settings, "--data", "a.hdf5", "--run-dir", "run")
    assert result.code == 2 and f"a.hdf5, latent {bad}, is not finite in float16" in result.err
    saved = sorted(path.name for path in Path("run/checkpoints").iterdir())
    assert len(saved) == 1 and 0 < int(saved[0][-8:]) < 17


def test_a_run_goes_on_with_the_same_latents_converted_and_with_no_others(call: Call) -> None:
    hdf5("a.hdf5")
    run = [*ON_LATENTS, "--run-dir", "run"]
    assert call(*run, "--steps", "2", "--data", "a.hdf5").code == 0
    assert call("encode", "--from", "a.hdf5", "ours").code == 0
    Path("a.hdf5").rename("b.hdf5")
    for step, place in ((4, "ours"), (6, "b.hdf5")):
        result = call(*run, "--steps", str(step), "--data", place)
        assert (result.code, result.err) == (0, "") and f"resuming run at step {step - 2} of {step}" in result.out
    Path("a").mkdir()
    hdf5("a/a.hdf5", r39=0.5)
    refused = call(*run, "--steps", "8", "--data", "a/a.hdf5")
    assert refused.code == 2 and "(other latents or labels)" in refused.err


def test_the_whole_way_of_latents(photos: Path, call: Call) -> None:
    """Photographs, a small VAE, latents, a training on them, and samples as pictures."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae, wide = (
        diffusers.AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=channels, norm_num_groups=4, sample_size=8, scaling_factor=0.5,
        )
        for channels in (4, 8)
    )  # fmt: skip
    vae.save_pretrained("vae")
    wide.save_pretrained("wide")
    encoded = call("encode", photos, "latents", "--vae", "vae", "--size", "8", "--flip", "--device", "cpu")
    assert (encoded.code, encoded.err) == (0, "")
    sizes = [f"--set={setting}" for setting in LATENTS]
    run = ["train", "imagenet256-b2", "--device", "cpu", "--precision", "fp32", "--batch-size", "4", *sizes]
    run += [
        "--set=run.log_every=1",
        "--set=run.sample_every=1",
        "--set=run.check_quotient_every=0",
        "--set=data.flip=true",
    ]
    result = call(*run, "--steps", "2", "--data", "latents", "--run-dir", "run")
    assert (result.code, result.err) == (0, "") and "3 classes: 2 4, 10 4, bee 4" in result.out
    with Image.open("run/samples/final.png") as grid:
        assert grid.mode == "RGB"
    drawn = call("sample", "run", "--out", "out", "--n", "2", "--labels", "bee", "--vae", "none")
    assert (drawn.code, drawn.err) == (0, "") and "2 latents" in drawn.out and "--vae vae decodes them" in drawn.out
    z = np.load("out/00001.npy")
    assert z.shape == (4, 4, 4) and not list(Path("out").glob("*.png"))
    shown = call("sample", "run", "--out", "shown", "--n", "2", "--labels", "bee", "--vae", "vae")
    assert (shown.code, shown.err) == (0, "")
    with torch.no_grad():
        wanted = vae.eval().decode(torch.from_numpy(z)[None] / 0.5).sample[0].permute(1, 2, 0)
    with Image.open("shown/00001.png") as image:
        np.testing.assert_allclose(np.asarray(image), ((wanted + 1) * 127.5).clamp(0, 255).numpy(), atol=1)
    for flags in ((), ("--vae", "vae")):
        result = call("sample", "run", "--out", "same", "--n", "2", "--labels", "bee", *flags)
        assert result.code == 0 and Path("same/00001.png").read_bytes() == Path("shown/00001.png").read_bytes()
    wide = call("sample", "run", "--out", "x", "--n", "1", "--vae", "wide")
    assert wide.code == 2 and "--vae wide: is of latents of 8 channels, not 4" in wide.err
    shutil.rmtree("vae")
    shutil.copytree("wide", "vae")
    drawn = call("sample", "run", "--out", "latents only", "--n", "1")
    assert drawn.code == 0 and "samples are written as latents, in .npy: vae: is of latents of 8 channels" in drawn.out
    again = call(*run, "--steps", "2", "--data", "latents", "--run-dir", "wide-run")
    assert again.code == 0 and "samples are written as latents, in .npy: vae: is of latents of 8" in again.out
    assert Path("wide-run/samples/final.npy").exists()
    shutil.rmtree("vae")
    drawn = call("sample", "run", "--out", "latents only", "--n", "1")
    assert drawn.code == 0 and "--vae vae decodes them" in drawn.out and Path("latents only/00000.npy").exists()
    again = call(*run, "--steps", "4", "--data", "latents", "--run-dir", "run")
    assert again.code == 0 and "samples are written as latents" in again.out and Path("run/samples/final.npy").exists()
    wrong = call(*run, "--data", "latents", "--run-dir", "other", "--set=data.vae=a/vae")
    assert wrong.code == 2 and "the latents are of the VAE vae, not of a/vae" in wrong.err
    wrong = call("train", *FLAGS, "--data", "latents", "--run-dir", "other")
    assert wrong.code == 2 and "these are latents: take a preset on latents" in wrong.err
    wrong = call("sample", "run", "--out", "x", "--n", "1", "--vae", "nowhere")
    assert wrong.code == 2 and "--vae nowhere: cannot be loaded" in wrong.err
