"""Files made by somebody who means harm: no code runs from them, nothing is read or written elsewhere, and no file
fills the memory."""

import functools
import hashlib
import io
import json
import math
import os
import pickle
import stat
import struct
import subprocess
import tracemalloc
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors

from soflow_fast import load_official
from soflow_fast.data import images
from soflow_fast.data.dataset import Wanted
from soflow_fast.errors import CheckpointError, DataError
from soflow_fast.runs import checkpoint


class Hostile:
    """An object that unpickles by running a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "mark"


@pytest.fixture
def hostile(tmp_path: Path, mark: Path) -> dict[str, Path]:
    """Pickles in everything that may hold one."""
    import numpy as np

    bad = Hostile(mark)
    found = {kind: tmp_path / f"bad.{kind}" for kind in ("pkl", "pt", "old.pt", "npy", "zip", "safetensors")}
    found["pkl"].write_bytes(pickle.dumps(bad))
    torch.save({"network.x": bad}, found["pt"])
    torch.save({"network.x": bad}, found["old.pt"], _use_new_zipfile_serialization=False)
    np.save(found["npy"], np.array([bad], dtype=object), allow_pickle=True)
    with zipfile.ZipFile(found["zip"], "w") as archive:
        archive.writestr("a/x.png", pickle.dumps(bad))
    found["safetensors"].write_bytes(pickle.dumps(bad))
    return found


def test_the_pickles_of_this_test_do_run(hostile: dict[str, Path], mark: Path) -> None:
    pickle.loads(hostile["pkl"].read_bytes())
    assert mark.exists()


def test_a_pickle_is_refused_wherever_a_file_is_asked_for(
    hostile: dict[str, Path], mark: Path, refused: Any, run_dir: Path, tmp_path: Path
) -> None:
    for file in hostile.values():
        for line in (
            refused("train", "--config", file),
            refused("train", "cifar10", "--data", file, "--device", "cpu", "--run-dir", tmp_path / "new"),
            refused("train", "--run-dir", file, "--device", "cpu"),
            refused("sample", file, "--out", tmp_path / "out"),
            refused("evaluate", file),
        ):
            assert str(file) in line
        with pytest.raises(CheckpointError, match=file.name) as error:
            load_official(file)
        assert "\n" not in str(error.value)
        folder = tmp_path / f"folder-{file.name}"
        (folder / "a").mkdir(parents=True)
        (folder / "a" / "x.png").write_bytes(file.read_bytes())
        assert "a/x.png" in refused("train", "cifar10", "--data", folder, "--run-dir", tmp_path / "new")
    assert not mark.exists() and not (tmp_path / "out").exists()


def test_a_pickle_inside_a_checkpoint_whose_sums_are_right_is_refused(
    hostile: dict[str, Path], mark: Path, refused: Any, run_dir: Path, tmp_path: Path
) -> None:
    newest = run_dir / "checkpoints" / "step-00000020"
    for name in ("ema.safetensors", "config.json", "state.json", "manifest.json"):
        whole = {file.name: file.read_bytes() for file in newest.iterdir()}
        (newest / name).write_bytes(hostile["pkl"].read_bytes())
        if name != "manifest.json":
            sums = json.loads(whole["manifest.json"])
            sums["sha256"][name] = hashlib.sha256((newest / name).read_bytes()).hexdigest()
            (newest / "manifest.json").write_text(json.dumps(sums))
        assert str(newest) in refused("sample", newest, "--out", tmp_path / "out")
        for file, content in whole.items():
            (newest / file).write_bytes(content)
    assert not mark.exists()


def never_ends(path: Path) -> None:
    path.symlink_to("/dev/zero")


def waits(path: Path) -> None:
    os.mkfifo(path)


def is_a_device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        pytest.skip("making a device is not permitted here")


def is_huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**30)


def is_elsewhere(path: Path) -> None:
    """The right file, behind a link out of the folder."""
    path.symlink_to(path.with_name(f"{path.name}.kept").rename(path.parents[2] / f"outside-{path.name}"))


@pytest.mark.parametrize("name", ["manifest.json", "config.json", "state.json", "ema.safetensors"])
@pytest.mark.parametrize("strange", [never_ends, waits, is_a_device, is_huge, is_elsewhere])
def test_a_file_that_fills_the_memory_or_is_none_or_is_elsewhere(name: str, strange: Any, run_dir: Path) -> None:
    newest = checkpoint.list_checkpoints(run_dir)[0]
    (newest / name).rename(newest / f"{name}.kept")
    strange(newest / name)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=rf"{newest}: not a whole checkpoint .*{name}") as error:
            checkpoint.load(newest)
        checkpoint.load(run_dir)  # from the one before
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert "\n" not in str(error.value) and peak < 100 * 2**20


@pytest.mark.parametrize("strange", [waits, is_a_device, is_huge])
def test_a_configuration_that_is_no_file(strange: Any, refused: Any, tmp_path: Path) -> None:
    strange(tmp_path / "config.json")
    assert f"--config {tmp_path / 'config.json'}: " in refused("train", "--config", tmp_path / "config.json")
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "config.json").rename(run / "config.json")
    assert str(run) in refused("train", "--run-dir", run, "--device", "cpu")


def test_links_that_the_user_names_are_followed(run_dir: Path, call: Any, tmp_path: Path) -> None:
    """A link to a run, to a checkpoint and to a configuration."""
    newest = checkpoint.list_checkpoints(run_dir)[0]
    for name, place in (("run", run_dir), ("checkpoint", newest), ("config.json", newest / "config.json")):
        (tmp_path / name).symlink_to(place)
    for name in ("run", "checkpoint"):
        checkpoint.load(tmp_path / name)
    assert call("train", "--config", tmp_path / "config.json", "--env").code == 0


@pytest.mark.parametrize(("kind", "length"), [("F4", 32), ("F6_E2M3", 48), ("F6_E3M2", 48), ("F8_E8M0", 64)])
def test_numbers_of_a_kind_that_torch_does_not_read(kind: str, length: int, run_dir: Path) -> None:
    newest = checkpoint.list_checkpoints(run_dir)[0]
    header = json.dumps({"x": {"dtype": kind, "shape": [64], "data_offsets": [0, length]}}).encode()
    put(newest, "ema.safetensors", struct.pack("<Q", len(header)) + header + bytes(length))
    with pytest.raises(CheckpointError, match=rf"ema\.safetensors: holds numbers of a kind .*{kind}"):
        checkpoint.load(newest)


def test_weights_that_are_not_finite_and_weights_that_make_such_samples(
    run_dir: Path, call: Any, tmp_path: Path
) -> None:
    newest = checkpoint.list_checkpoints(run_dir)[0]
    weights = load_file(newest / "ema.safetensors")
    for value, code, said in ((math.nan, 2, "is not finite"), (1e38, 1, "not finite")):
        spoilt = {name: torch.full_like(weight, value) for name, weight in weights.items()}
        put(newest, "ema.safetensors", to_safetensors(spoilt))
        for module, more in (("sample", ["--out", tmp_path / "out"]), ("evaluate", ["--n", "100"])):
            result = call(module, newest, *more)
            assert result.code == code and said in result.err and result.err.count("\n") == 1, result
    assert not (tmp_path / "out").exists()


def put(folder: Path, name: str, content: bytes) -> None:
    """Replace a file of a checkpoint and set its sum right."""
    sums = json.loads((folder / "manifest.json").read_text())
    (folder / name).write_bytes(content)
    sums["sha256"][name] = hashlib.sha256(content).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(sums))


def test_what_is_said_moves_no_cursor(refused: Any, tmp_path: Path) -> None:
    line = refused("evaluate", tmp_path / "\x1b[2J\x9b2J\x07\u202e")
    assert line.endswith("\\x1b[2J\\x9b2J\\x07\\u202e: no such run or checkpoint\n")


def test_an_image_that_asks_for_a_program_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow hands EPS to Ghostscript, whatever the file is called."""
    started: list[Any] = []
    monkeypatch.setattr(subprocess, "check_call", lambda *a, **k: started.append(a))
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(a))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n(%pipe%id) (w) file\n%%EOF\n"
    )
    with pytest.raises(DataError, match=r"a/x\.png is no readable image \(UnidentifiedImageError\)"):
        images.load(tmp_path, Wanted(4, 3))
    assert started == []


def picture(size: int = 4) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "name", ["../x.png", "a/../../x.png", "/etc/x.png", "a/..\\..\\x.png", "a/../x.png"], ids=lambda name: name
)
def test_a_zip_that_points_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/good.png", picture())
        archive.writestr(name, picture())
    with pytest.raises(DataError, match="points out of the zip") as error:
        images.load(path, Wanted(4, 3))
    assert repr(name) in str(error.value)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, data: bytes, *more: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


ZEROS = zlib.compress(bytes(200 * 2**20), 9)
BOMBS = {
    "14000 x 14000 pixels": png(14000, 14000, ZEROS),
    "60000 x 60000 pixels": png(60000, 60000, ZEROS),
    "9600 x 9600 pixels": png(9600, 9600, ZEROS),
    "a text of 200 MB": png(4, 4, ZEROS, chunk(b"zTXt", b"k\0\0" + ZEROS)),
    "a profile of 200 MB": png(4, 4, ZEROS, chunk(b"iCCP", b"k\0\0" + ZEROS)),
    "pixels of 200 MB": png(4, 4, ZEROS),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_an_image_that_unpacks_to_much_more_is_refused_or_not_unpacked(kind: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(BOMBS[kind])
    tracemalloc.start()
    try:
        images.load(tmp_path, Wanted(4, 3))
    except DataError as error:
        assert "a/x.png" in str(error) and "\n" not in str(error)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 20 * 2**20, "a tenth of what it unpacks to"


@functools.cache
def bomb(method: int, length: int) -> bytes:
    """A zip whose member unpacks to so many bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("a/x.png", bytes(length))
    return buffer.getvalue()


# The others are refused for their method alone, whatever the directory claims.
@pytest.mark.parametrize(
    ("method", "honest"),
    [
        (zipfile.ZIP_DEFLATED, True),
        (zipfile.ZIP_DEFLATED, False),
        (zipfile.ZIP_BZIP2, True),
        (zipfile.ZIP_LZMA, True),
    ],
)
def test_a_member_that_unpacks_to_much_more_than_an_image(method: int, honest: bool, tmp_path: Path) -> None:
    """Also where the directory of the zip claims less."""
    path, length = tmp_path / "set.zip", 200 * 2**20
    content = bomb(method, length)
    path.write_bytes(content if honest else content.replace(struct.pack("<I", length), struct.pack("<I", 1000)))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"a/x\.png is (compressed by another|no readable)|unpacks to 200"):
            images.load(path, Wanted(4, 3))
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 100 * 2**20


def test_a_file_that_is_too_long_for_an_image(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with (tmp_path / "a" / "x.png").open("wb") as file:
        file.truncate(2**36)
    with pytest.raises(DataError, match=r"a/x\.png has 65536 MiB"):
        images.load(tmp_path, Wanted(4, 3))


def test_weights_that_unpack_to_much_more_are_refused(tmp_path: Path) -> None:
    plain, packed = tmp_path / "plain.pt", tmp_path / "packed.pt"
    torch.save({"network.x_embedder.proj.weight": torch.zeros(2**20)}, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    with pytest.raises(CheckpointError, match=r"packed\.pt: not a checkpoint of plain weights \(its parts are comp"):
        load_official(packed)
    torch.save({"network.x_embedder.proj.weight": torch.zeros(1).expand(2**20, 2**20)}, plain)
    with pytest.raises(CheckpointError, match=r"plain\.pt: .*a tensor is larger than what is stored"):
        load_official(plain)
