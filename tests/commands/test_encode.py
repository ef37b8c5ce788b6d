"""`python -m soflow_fast.encode`: images into latents, resumed and refused, and latents of others converted."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from soflow_fast import files as files_module
from soflow_fast.data import latents
from soflow_fast.data.dataset import Contents, Dataset, Wanted
from soflow_fast.data.latents import writer
from soflow_fast.errors import DataError
from soflow_fast.runs.latents import encoding
from soflow_fast.runs.latents.vae import load_vae

N, SIZE = 11, 16
ANY = Wanted(0, 0)
Call = Callable[..., Any]


class Pixels(Dataset):
    """Images of noise, in the place of those of a folder."""

    def __init__(self, count: int = N, size: int = SIZE, checksum: str = "noise") -> None:
        source = np.random.RandomState(0)
        self.pixels = torch.from_numpy(source.randint(0, 256, (count, 3, size, size), dtype=np.uint8))
        self.labels = torch.arange(count) % 3
        self.shape = (3, size, size)
        self.contents = Contents("noise", ("ant", "bee", "cat"), checksum=checksum)

    def read(self, index: Tensor, mirrored: Tensor | None = None) -> Tensor:
        return self.pixels[index]


@pytest.fixture(scope="module")
def vaes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tiny VAEs, "one" and "two", which halve height and width."""
    diffusers = pytest.importorskip("diffusers")
    place = tmp_path_factory.mktemp("vaes")
    for seed, name in enumerate(("one", "two")):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = diffusers.AutoencoderKL(
                block_out_channels=(4, 4),
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                latent_channels=4,
                norm_num_groups=2,
                scaling_factor=0.5,
                shift_factor=0.25,
            )
            model.save_pretrained(place / name)
    return place


@pytest.fixture(autouse=True)
def images(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Dataset]:
    """What opening images gives; shards of 4."""
    found: dict[str, Dataset] = {"images": Pixels()}

    def open_images(path: str, size: int, say: Callable[[str], None]) -> Dataset:
        if path not in found:
            raise DataError(f"--data {path}: no such file or folder")
        return found[path]

    monkeypatch.setattr(encoding, "open_images", open_images)
    monkeypatch.setattr(encoding, "shard_rows", lambda count, row: 4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return found


def flags(vaes: Path, *more: object) -> list[object]:
    return ["--vae", vaes / "one", "--size", SIZE, "--device", "cpu", "--batch-size", 3, *more]


def test_images_are_encoded(call: Call, vaes: Path, tmp_path: Path, images: dict[str, Pixels]) -> None:
    import diffusers

    result = call("encode", "images", tmp_path / "out", *flags(vaes, "--flip"))
    assert result.code == 0, result
    assert result.out.splitlines()[-1] == f"11 images encoded: {tmp_path / 'out'}"
    assert "11/11 images" in result.out and result.err == ""
    found = latents.load(tmp_path / "out", Wanted(8, 4, vae=str(vaes / "one")))
    assert found.labels.tolist() == images["images"].labels.tolist() and len(found) == N and found.mirrors
    assert found.contents.classes == ("ant", "bee", "cat")
    model = diffusers.AutoencoderKL.from_pretrained(vaes / "one").eval()
    everything, eps = torch.arange(N), torch.randn(N, 4, 8, 8)
    for flip in (False, True):
        x = images["images"].pixels.float() / 127.5 - 1
        with torch.no_grad():
            posterior = model.encode(x.flip(3) if flip else x).latent_dist
        raw = found.read(everything, torch.full((N,), flip))
        wanted = torch.cat([posterior.mean, posterior.std], 1)
        torch.testing.assert_close(raw.float(), wanted, atol=1e-3, rtol=2e-3)
        sample = (posterior.mean + posterior.std * eps - 0.25) * 0.5  # as diffusers' pipelines
        torch.testing.assert_close(found.decoded(raw, lambda shape: eps), sample, atol=5e-3, rtol=5e-3)
    header = json.loads((tmp_path / "out" / "latents.json").read_text())
    assert (header["image_size"], header["scale"], header["shift"]) == (16, 0.5, 0.25)
    assert (header["vae"], header["source"], len(header["weights"])) == (str(vaes / "one"), "noise", 64)


def test_vectors_are_kept_with_latents(
    call: Call, refused: Call, vaes: Path, tmp_path: Path, images: dict[str, Dataset]
) -> None:
    """Those that are given, those that lie beside the images, and those of latents of others."""
    values = np.random.default_rng(0).standard_normal((N, 5)).astype(np.float32)
    np.save(tmp_path / "v.npy", values)
    (tmp_path / "photos").mkdir()
    images[str(tmp_path / "photos")] = Pixels()
    np.save(tmp_path / "photos" / "conditions.npy", -values)
    fast_dit(tmp_path / "theirs")
    np.save(tmp_path / "theirs" / "conditions.npy", 2 * values)
    for name, arguments, wanted in (
        ("given", ["images", tmp_path / "given", *flags(vaes), "--conditions", tmp_path / "v.npy"], values),
        ("beside", [tmp_path / "photos", tmp_path / "beside", *flags(vaes)], -values),
        ("converted", ["--from", tmp_path / "theirs", tmp_path / "converted"], 2 * values),
    ):
        result = call("encode", *arguments)
        assert (result.code, result.err) == (0, "") and "conditions: vectors of 5 numbers, float32" in result.out, name
        assert np.array_equal(np.load(tmp_path / name / "conditions.npy"), wanted)
        assert len(json.loads((tmp_path / name / "latents.json").read_text())["conditions"]) == 64
        assert len(latents.load(tmp_path / name, ANY)) == len(wanted)
    np.save(tmp_path / "v.npy", values[:3])
    said = refused("encode", "images", tmp_path / "few", *flags(vaes), "--conditions", tmp_path / "v.npy")
    assert f"--conditions {tmp_path / 'v.npy'}: holds 3 vectors, the data {N} samples" in said


def test_without_flip_there_is_no_twin(call: Call, vaes: Path, tmp_path: Path) -> None:
    assert call("encode", "images", tmp_path / "out", *flags(vaes)).code == 0
    assert not latents.load(tmp_path / "out", ANY).mirrors and not [*(tmp_path / "out").glob("mirrored*")]


@pytest.mark.parametrize("killed", range(1, 5))
def test_an_encoding_that_is_cut_short_goes_on_to_the_same_bytes(
    call: Call, vaes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: int, files: Call
) -> None:
    class Killed(Exception):
        pass

    whole, again = tmp_path / "whole", tmp_path / "again"
    assert call("encode", "images", whole, *flags(vaes, "--flip")).code == 0
    appended, real = [], writer.Writer.append

    def append(self: writer.Writer, *arguments: Any) -> None:
        if len(appended) == killed:
            raise Killed
        appended.append(1)
        real(self, *arguments)

    monkeypatch.setattr(writer.Writer, "append", append)
    with pytest.raises(Killed):
        encoding.encode(
            Pixels(),
            again,
            load_vae(str(vaes / "one"), torch.device("cpu")),
            size=SIZE,
            flip=True,
            batch_size=3,
            devices=[torch.device("cpu")],
        )
    monkeypatch.setattr(writer.Writer, "append", real)
    result = call("encode", "images", again, *flags(vaes, "--flip"))
    assert result.code == 0 and (killed < 2) == ("are there already" not in result.out)
    assert files(again) == files(whole)
    result = call("encode", "images", again, *flags(vaes, "--flip"))  # there is nothing left to do
    assert result.code == 0 and "11 of 11 are there already" in result.out and files(again) == files(whole)


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
from test_encode import Pixels
from soflow_fast import encode
from soflow_fast.commands import process
from soflow_fast.runs.latents import encoding

class Slow(Pixels):
    def read(self, index, mirrored=None):
        time.sleep(0.2 if index.max() < 4 else 5)  # of the second shard on: this process may be starved meanwhile
        return super().read(index)

encoding.open_images = lambda path, size, say: Slow()
encoding.shard_rows = lambda count, row: 4
process.run(lambda: encode.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_process_that_is_killed_goes_on_to_the_same_bytes(
    call: Call, vaes: Path, tmp_path: Path, environment: dict[str, str], number: int, code: int, files: Call
) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert call("encode", "images", whole, *flags(vaes)).code == 0
    script = KILLED.format(tests=str(Path(__file__).parent))
    arguments = [sys.executable, "-c", script, "images", str(again), *map(str, flags(vaes, "--workers", 1))]
    with subprocess.Popen(
        arguments, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as p:
        assert p.stderr
        begun = time.monotonic()
        manifest = again / "latents.json"
        while not (manifest.exists() and '"sha256"' in manifest.read_text()) and time.monotonic() - begun < 100:
            time.sleep(0.01)
        os.kill(p.pid, number)
        err = p.stderr.read()
        assert p.wait() == code and "Traceback" not in err
    if number != signal.SIGKILL:
        assert not [*again.glob(".*.partial*")] and "of 11 are kept, and the same command goes on" in err
    assert not (again / "shard-00002.npy").exists()
    assert call("encode", "images", again, *flags(vaes)).code == 0
    assert files(again) == files(whole)


def test_other_content_or_another_vae_is_not_gone_on_with(
    refused: Call, call: Call, vaes: Path, tmp_path: Path, images: dict[str, Dataset]
) -> None:
    out = tmp_path / "out"
    images |= {"other": Pixels(checksum="x"), "more": Pixels(N + 1)}
    assert call("encode", "images", out, *flags(vaes)).code == 0
    assert "is encoded from other content" in refused("encode", "other", out, *flags(vaes))
    assert "is begun with count 11, not 12" in refused("encode", "more", out, *flags(vaes))
    assert "is begun with flipped False, not True" in refused("encode", "images", out, *flags(vaes, "--flip"))
    said = refused("encode", "images", out, *flags(vaes), "--vae", vaes / "two")
    assert f"is begun with vae {vaes / 'one'}, not {vaes / 'two'}" in said
    for same in (f"{vaes / 'one'}/", vaes / "two" / ".." / "one"):
        assert call("encode", "images", out, *flags(vaes), "--vae", same).code == 0
    (vaes / "one").rename(vaes / "kept")
    (vaes / "two").rename(vaes / "one")
    try:
        assert "is encoded with other weights of the VAE" in refused("encode", "images", out, *flags(vaes))
    finally:
        (vaes / "one").rename(vaes / "two")
        (vaes / "kept").rename(vaes / "one")


@pytest.mark.parametrize(("stored", "other"), [(N, 0), (N, N // 2), (N, N - 1), (8, 4), (8, 7)])
def test_other_pixels_under_the_same_names_are_seen(
    refused: Call, call: Call, vaes: Path, tmp_path: Path, images: dict[str, Pixels], stored: int, other: int
) -> None:
    """One image of those that are compared is enough, whether there is something left to encode or not."""
    out = tmp_path / "out"
    assert call("encode", "images", out, *flags(vaes, "--flip")).code == 0
    if stored < N:
        text = json.loads((out / "latents.json").read_text())
        (out / "latents.json").write_text(json.dumps(text | {"shards": text["shards"][: stored // 4]}))
    pixels = images["images"].pixels
    images["images"].pixels = pixels.clone()
    images["images"].pixels[other] = pixels[other].flip(1)
    said = refused("encode", "images", out, *flags(vaes, "--flip"))
    assert f"{out}: is encoded from other content; give another folder, or remove this one" in said
    images["images"].pixels = pixels
    assert call("encode", "images", out, *flags(vaes, "--flip")).code == 0


def test_another_device_rounds_in_another_way(
    call: Call, vaes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As TF32 does, by 2^-11 of each number that goes into a product."""
    assert call("encode", "images", tmp_path / "out", *flags(vaes)).code == 0
    real = torch.nn.functional.conv2d

    def conv2d(x: Tensor, weight: Tensor, *more: Any) -> Tensor:
        return real(*(part + part * 2**-11 * torch.randn_like(part) for part in (x, weight)), *more)

    monkeypatch.setattr(torch.nn.functional, "conv2d", conv2d)
    result = call("encode", "images", tmp_path / "out", *flags(vaes))
    assert result.code == 0 and "11 of 11 are there already" in result.out


@pytest.mark.parametrize("name", ["shard-00001.npy", "labels-00001.npy", "mirrored-00001.npy"])
@pytest.mark.parametrize("how", ["missing", "short", "damaged"])
def test_what_is_missing_or_damaged_is_encoded_anew(
    call: Call, vaes: Path, tmp_path: Path, files: Call, damage: Call, name: str, how: str
) -> None:
    out = tmp_path / "out"
    assert call("encode", "images", out, *flags(vaes, "--flip")).code == 0
    whole = files(out)
    if how == "missing":
        (out / name).unlink()
    elif how == "short":
        (out / name).write_bytes((out / name).read_bytes()[:-3])
    else:
        damage(out / name)
    result = call("encode", "images", out, *flags(vaes, "--flip"))
    assert result.code == 0 and "4 of 11 are there already" in result.out
    assert f"{out}: {name}" in result.out and "; it and what follows it are written anew" in result.out
    assert files(out) == whole


def test_of_two_that_write_to_a_folder_the_second_is_refused(
    refused: Call, call: Call, vaes: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    with files_module.locked(tmp_path / "out", "", pytest.fail):
        said = refused("encode", "images", tmp_path / "out", *flags(vaes))
    assert f"{tmp_path / 'out'}: another process writes to it" in said
    assert call("encode", "images", tmp_path / "out", *flags(vaes)).code == 0


def test_what_a_kill_leaves_of_the_first_manifest_is_removed(call: Call, vaes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in (".latents.json.partial-123", ".shard-00000.npy.partial"):
        (out / name).write_text("{")
    assert call("encode", "images", out, *flags(vaes)).code == 0
    assert sorted(path.name for path in out.glob(".*")) == [".lock"]


def test_a_folder_of_something_else_is_left_alone(refused: Call, vaes: Path, tmp_path: Path) -> None:
    for name in ("thesis.txt", ".thesis.txt.partial-1"):
        out = tmp_path / name
        out.mkdir()
        (out / name).write_text("x")
        assert "holds other files" in refused("encode", "images", out, *flags(vaes))
        assert [path.name for path in out.iterdir()] == [name]


def test_what_is_refused(refused: Call, vaes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "IMAGES nothing: no such file" in refused("encode", "nothing", out, *flags(vaes))
    assert "give IMAGES and OUT, got 1 of 2" in refused("encode", "images")
    assert "give OUT, got 2 of 1" in refused("encode", "a", "b", "--from", "c")
    assert "--batch-size must be" in refused("encode", "images", out, "--batch-size", "0")
    assert "--size must be" in refused("encode", "images", out, "--size", "x")
    assert "--workers must be a whole number from 0 to 256" in refused("encode", "images", out, "--workers", "-1")
    assert "--device cpu,cpu: names a device twice" in refused("encode", "images", out, "--device", "cpu,cpu")
    assert "--workers: is of no use with --from" in refused("encode", out, "--from", "x", "--workers", "0")
    assert "--flip: is of no use with --from" in refused("encode", out, "--from", "x", "--flip")
    assert "--channels: is of use with --from only" in refused("encode", "images", out, "--channels", "4")
    assert "--from x: no such file or folder" in refused("encode", out, "--from", "x")
    assert "--vae" in refused("encode", "images", out, "--vae", tmp_path, "--device", "cpu")
    out.write_text("a file")
    assert "is a file" in refused("encode", "images", out, *flags(vaes))
    out.unlink()
    (out / "x").mkdir(parents=True)
    assert "holds other files" in refused("encode", "images", out, *flags(vaes))


def test_a_vae_in_a_pickle_is_not_loaded(refused: Call, vaes: Path, tmp_path: Path) -> None:
    import diffusers

    diffusers.AutoencoderKL.from_pretrained(vaes / "one").save_pretrained(tmp_path / "vae", safe_serialization=False)
    assert "--vae" in refused("encode", "images", tmp_path / "out", *flags(vaes), "--vae", tmp_path / "vae")
    assert not (tmp_path / "out").exists()


def altered(vaes: Path, place: Path, **config: object) -> Path:
    """A copy of a VAE with another configuration."""
    shutil.copytree(vaes / "one", place)
    known = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(known | config))
    return place


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"scaling_factor": "abc"}, "scaling_factor of its configuration makes no sense: abc"),
        ({"scaling_factor": [1, 2]}, "scaling_factor of its configuration makes no sense: [1, 2]"),
        ({"scaling_factor": 0.0}, "scaling_factor of its configuration makes no sense: 0.0"),
        ({"scaling_factor": 10**400}, "scaling_factor of its configuration makes no sense: 1000"),
        ({"shift_factor": "q"}, "shift_factor of its configuration makes no sense: q"),
        ({"shift_factor": float("nan")}, "shift_factor of its configuration makes no sense: nan"),
        ({"latents_mean": [0] * 4, "latents_std": [1, 1, 0, 1]}, "latents_std of its configuration makes no sense: 0"),
        ({"latents_mean": ["a"] * 4, "latents_std": [1] * 4}, "latents_mean of its configuration makes no sense: a"),
        ({"latents_mean": 1.0, "latents_std": 2.0}, "latents_std of its configuration is no list of 4 numbers"),
        ({"latents_mean": [0] * 3, "latents_std": [1] * 4}, "latents_mean of its configuration is no list of 4"),
        ({"_class_name": "VQModel"}, "is of the class VQModel, not AutoencoderKL"),
        ({"use_quant_conv": False}, "the configuration has no place for quant_conv.bias, quant_conv.weight\n"),
    ],
)
def test_a_vae_whose_configuration_is_wrong(
    refused: Call, vaes: Path, tmp_path: Path, config: dict[str, object], said: str
) -> None:
    vae = altered(vaes, tmp_path / "vae", **config)
    line = refused("encode", "images", tmp_path / "out", *flags(vaes, "--vae", vae))
    assert f"--vae {vae}: {said}" in line and not (tmp_path / "out").exists()


def test_a_vae_whose_configuration_is_none(refused: Call, vaes: Path, tmp_path: Path) -> None:
    vae = altered(vaes, tmp_path / "vae")
    for text in ("[]", "null", "3", "{"):
        (vae / "config.json").write_text(text)
        assert f"--vae {vae}: " in refused("encode", "images", tmp_path / "out", *flags(vaes, "--vae", vae))


def test_a_vae_whose_file_lacks_weights(refused: Call, vaes: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    vae = altered(vaes, tmp_path / "vae")
    file = vae / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["encoder.conv_in.weight"]
    save_file(weights, file, {"format": "pt"})
    line = refused("encode", "images", tmp_path / "out", *flags(vaes, "--vae", vae))
    assert f"--vae {vae}: the file lacks encoder.conv_in.weight\n" in line
    save_file({name: value for name, value in weights.items() if "norm" not in name}, file, {"format": "pt"})
    line = refused("encode", "images", tmp_path / "out", *flags(vaes, "--vae", vae))
    assert "the file lacks decoder.conv_norm_out.bias, decoder.conv_norm_out.weight, decoder.mid_block" in line
    assert " more\n" in line and not (tmp_path / "out").exists()


def test_a_vae_with_the_names_of_weights_that_once_were(vaes: Path, tmp_path: Path) -> None:
    """As in files of Stable Diffusion's first VAEs."""
    from safetensors.torch import load_file, save_file

    vae = altered(vaes, tmp_path / "vae")
    file = vae / "diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(file)
    for now, once in names.items():
        for name in [name for name in weights if f".{now}." in name]:
            weights[name.replace(now, once)] = weights.pop(name)
    assert any("proj_attn" in name for name in weights)
    save_file(weights, file, {"format": "pt"})
    cpu = torch.device("cpu")
    assert load_vae(str(vae), cpu).weights == load_vae(str(vaes / "one"), cpu).weights


def test_images_that_a_vae_does_not_take(refused: Call, vaes: Path, tmp_path: Path, images: dict[str, Dataset]) -> None:
    images |= {"dots": Pixels(size=1), "gray": Pixels()}
    images["gray"].shape = (1, SIZE, SIZE)
    said = refused("encode", "dots", tmp_path / "out", *flags(vaes), "--size", "1")
    assert f"--size 1: --vae {vaes / 'one'} takes images of 2 x 2 pixels or more" in said
    said = refused("encode", "gray", tmp_path / "out", *flags(vaes))
    assert f"--vae {vaes / 'one'}: takes images of 3 channels, these have 1" in said


def test_what_is_written_lies_apart_from_what_is_read(
    refused: Call, call: Call, vaes: Path, tmp_path: Path, images: dict[str, Dataset]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (tmp_path / "link").symlink_to(photos)
    images[str(photos)] = Pixels()
    for out in (photos, photos / "a" / "out", tmp_path / "link" / "out", photos / ".." / "photos" / "out"):
        said = refused("encode", photos, out, *flags(vaes))
        assert f"OUT {out}: lies in {photos}, which is read; give a folder elsewhere" in said
    assert not [*photos.iterdir()] and call("encode", photos, tmp_path / "photos-out", *flags(vaes)).code == 0
    fast_dit(tmp_path / "theirs")
    said = refused("encode", "--from", tmp_path / "theirs", tmp_path / "theirs" / "out")
    assert f"lies in {tmp_path / 'theirs'}, which is read" in said and not (tmp_path / "theirs" / "out").exists()


def test_a_vae_in_a_pipeline_with_statistics_of_channels(call: Call, vaes: Path, tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "vae").symlink_to(vaes / "one")
    config = json.loads((vaes / "one" / "config.json").read_text())
    mean, std = [1.0, 2.0, 3.0, 4.0], [2.0, 4.0, 8.0, 16.0]
    try:
        (vaes / "one" / "config.json").write_text(json.dumps(config | {"latents_mean": mean, "latents_std": std}))
        result = call("encode", "images", tmp_path / "out", *flags(vaes), "--vae", tmp_path / "pipeline")
    finally:
        (vaes / "one" / "config.json").write_text(json.dumps(config))
    assert result.code == 0, result
    layout = latents.load(tmp_path / "out", ANY).layout
    assert layout.scale == tuple(0.5 / value for value in std) and layout.shift == tuple(mean)


def test_diffusers_is_needed(refused: Call, vaes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "needs diffusers: pip install" in refused("encode", "images", tmp_path / "out", *flags(vaes))


def test_a_full_disk_is_said(vaes: Path, refused: Call, mount: Call) -> None:
    out = mount("size=40k") / "out"
    assert "No space left" in refused("encode", "images", out, *flags(vaes, "--flip"))


def fast_dit(place: Path) -> None:
    for name in ("features", "labels"):
        (place / f"imagenet256_{name}").mkdir(parents=True)
    for i in range(N):
        np.save(place / "imagenet256_features" / f"{i}.npy", np.full((1, 4, 8, 8), i, np.float32))
        np.save(place / "imagenet256_labels" / f"{i}.npy", np.array([i % 3]))


def test_latents_of_others_are_converted(call: Call, refused: Call, tmp_path: Path, files: Call) -> None:
    fast_dit(tmp_path / "theirs")
    arguments = ("encode", "--from", tmp_path / "theirs", tmp_path / "out", "--vae", "stabilityai/sd-vae-ft-ema")
    result = call(*arguments)
    assert result.code == 0 and f"11 latents converted: {tmp_path / 'out'}" in result.out, result
    found = latents.load(tmp_path / "out", Wanted(8, 4, vae="stabilityai/sd-vae-ft-ema"))
    assert torch.equal(found.read(torch.arange(N))[:, 0, 0, 0], torch.arange(N).half())
    assert found.layout.scale == 1.0 and not found.layout.std
    before = files(tmp_path / "out")
    assert call(*arguments).code == 0 and files(tmp_path / "out") == before
    said = refused("encode", "--from", tmp_path / "theirs", tmp_path / "out", "--vae", "another")
    assert "is begun with vae stabilityai/sd-vae-ft-ema, not another" in said
    said = refused("encode", "--from", tmp_path / "out", tmp_path / "again")
    assert "is in our format already" in said
    said = refused("encode", "--from", tmp_path / "theirs", tmp_path / "again", "--channels", "16")
    assert f"--from {tmp_path / 'theirs'}: the latents are 4 x 8 x 8, --channels says 16\n" in said
    np.save(tmp_path / "theirs" / "imagenet256_features" / "10.npy", np.zeros(3))
    said = refused("encode", "--from", tmp_path / "theirs", tmp_path / "again")
    assert f"--from {tmp_path / 'theirs'}: imagenet256_features/10.npy cannot be read" in said


def test_the_flags() -> None:
    from soflow_fast import encode

    names = [
        "--help",
        "--from",
        "--vae",
        "--size",
        "--conditions",
        "--flip",
        "--batch-size",
        "--device",
        "--workers",
        "--channels",
    ]
    assert encode.parser().flags() == names
