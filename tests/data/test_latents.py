"""The project's own folders of latents: written, resumed, checked, read and drawn of."""

import hashlib
import io
import json
import multiprocessing
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from soflow_fast import files as files_module
from soflow_fast.data.dataset import Wanted
from soflow_fast.data.latents import Header, Latents, Layout, Writer, check, load, recognises, writer
from soflow_fast.errors import DataError

LAYOUT = Layout(4, 6, 6, True, 0.18215, 0.0, "a/vae")
HEADER = Header(LAYOUT, 23, 5, True, ("ant", "bee", "cat"), 48, "abc", "def")
ANY = Wanted(0, 0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return files_module.cache_folder()


def content(header: Header = HEADER, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, labels and the twins' latents."""
    source = torch.Generator().manual_seed(seed)
    a, b = (torch.rand(header.count, *header.layout.row(), generator=source) for _ in range(2))
    labels = torch.randint(0, max(len(header.classes), 1), (header.count,), generator=source)
    return a.half(), labels, b.half()


def write(folder: Path, header: Header = HEADER, batch: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    a, labels, b = content(header)
    made = Writer(folder, header)
    for at in range(made.done, header.count, batch):
        part = slice(at, at + batch)
        made.append(a[part], labels[part], b[part] if header.flipped else None)
    assert made.done == header.count
    return a, labels, b


def refusal(folder: Path, wanted: Wanted = ANY) -> str:
    """The one line by which a folder is refused, without its path."""
    with pytest.raises(DataError) as error:
        found = load(folder, wanted)
        found.read(torch.arange(len(found)))
    text = str(error.value)
    assert text.startswith(f"--data {folder}: ") and "\n" not in text
    return text.removeprefix(f"--data {folder}: ")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "set")
    return tmp_path / "set"


def test_what_is_written_is_read(folder: Path) -> None:
    a, labels, b = content()
    assert recognises(folder) and not recognises(folder.parent) and not recognises(folder / "latents.json")
    found = load(folder, Wanted(6, 4))
    assert isinstance(found, Latents) and len(found) == 23 and found.shape == (4, 6, 6) and found.mirrors
    assert found.contents.classes == ("ant", "bee", "cat") and torch.equal(found.labels, labels)
    index = torch.tensor([22, 0, 7, 7, 4, 5])
    raw = found.read(index)
    assert raw.dtype == torch.float16 and torch.equal(raw, a[index])
    mirrored = torch.tensor([True, False, True, False, True, False])
    assert torch.equal(found.read(index, mirrored), torch.where(mirrored[:, None, None, None], b[index], a[index]))
    assert found.read(torch.tensor([], dtype=torch.int64)).shape == (0, 8, 6, 6)
    names = sorted(path.name for path in folder.iterdir())
    assert names == [f"labels-0000{i}.npy" for i in range(5)] + ["latents.json"] + [
        f"{kind}-0000{i}.npy" for kind in ("mirrored", "shard") for i in range(5)
    ]
    assert np.load(folder / "shard-00004.npy").shape == (3, 8, 6, 6)  # as anybody can


def test_without_twin_std_and_classes(tmp_path: Path) -> None:
    header = Header(Layout(3, 2, 5, False, (1.0, 2.0, 0.5), (0.0, 1.0, -1.0)), 4, 10)
    a, _, _ = write(tmp_path / "set", header)
    found = load(tmp_path / "set", ANY)
    assert not found.mirrors and found.contents.classes == () and not found.labels.any()
    raw = found.read(torch.arange(4))
    x = found.decoded(raw, lambda shape: pytest.fail("noise is not needed"))
    scale, shift = (torch.tensor(v)[:, None, None] for v in (header.layout.scale, header.layout.shift))
    assert x.dtype == torch.float32 and torch.equal(x, (a.float() - shift) * scale)
    with pytest.raises(DataError, match="mirrored"):
        found.read(torch.tensor([0]), torch.tensor([True]))


def test_a_sample_is_drawn_of_the_distribution(folder: Path) -> None:
    found = load(folder, ANY)
    raw = found.read(torch.arange(5))
    eps = torch.randn(5, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    shapes = []
    x = found.decoded(raw, lambda shape: (shapes.append(shape), eps)[1])
    mean, std = raw.double().chunk(2, 1)
    torch.testing.assert_close(x.double(), (mean + std * eps) * 0.18215, rtol=1e-6, atol=1e-7)
    assert shapes == [(5, 4, 6, 6)] and x.dtype == torch.float32


def test_a_sample_is_drawn_on_the_device_of_the_rows(tmp_path: Path) -> None:
    header = Header(Layout(4, 2, 2, True, (1.0, 2.0, 3.0, 4.0)), 2, 5)
    write(tmp_path / "set", header)
    found = load(tmp_path / "set", ANY)
    x = found.decoded(found.read(torch.arange(2)).to("meta"), torch.zeros)
    assert x.device.type == "meta" and x.shape == (2, 4, 2, 2)
    assert found.decoded(found.read(torch.arange(2)), torch.zeros).device.type == "cpu"


def test_processes_read_for_themselves(folder: Path) -> None:
    found = load(folder, ANY)
    a, _, _ = content()
    again = pickle.loads(pickle.dumps(found))
    assert len(pickle.dumps(found)) < 10_000 and torch.equal(again.read(torch.arange(23)), a)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for at, raw in enumerate(pool.map(found.read, [torch.arange(3), torch.arange(9, 12)])):
            assert torch.equal(raw, a[9 * at : 9 * at + 3])


@pytest.mark.parametrize("killed", [1, 4, 5, 9, 13, 22])
def test_a_writer_that_was_killed_goes_on(tmp_path: Path, folder: Path, killed: int, files) -> None:
    a, labels, b = content()
    begun = Writer(tmp_path / "begun", HEADER)
    for at in range(killed):
        begun.append(a[at : at + 1], labels[at : at + 1], b[at : at + 1])
    assert begun.done == killed // 5 * 5
    shutil.copytree(tmp_path / "begun", tmp_path / "again")  # as a kill leaves it, with parts of files
    begun.close()
    assert refusal(tmp_path / "again").startswith(f"only {killed // 5 * 5} of 23 images are encoded")
    write(tmp_path / "again", batch=6)
    assert files(tmp_path / "again") == files(folder)
    assert Writer(folder, HEADER).done == 23


def test_a_kill_between_shard_and_manifest(tmp_path: Path, folder: Path, monkeypatch, files) -> None:
    a, labels, b = content()
    begun = Writer(tmp_path / "again", HEADER)
    monkeypatch.setattr(writer, "write_file", lambda path, text: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        begun.append(a[:5], labels[:5], b[:5])
    monkeypatch.undo()
    write(tmp_path / "again")
    assert files(tmp_path / "again") == files(folder)


def test_close_leaves_no_part(tmp_path: Path) -> None:
    a, labels, b = content()
    begun = Writer(tmp_path / "set", HEADER)
    begun.append(a[:7], labels[:7], b[:7])
    begun.close()
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == [
        "labels-00000.npy",
        "latents.json",
        "mirrored-00000.npy",
        "shard-00000.npy",
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"source": "x"}, "is encoded from other content"),
        ({"weights": "x"}, "is encoded with other weights of the VAE"),
        ({"layout": Layout(4, 6, 6, True, 0.18215, 0.0, "b")}, "is begun with vae a/vae, not b"),
        ({"layout": Layout(4, 6, 6, True, 0.5, 0.0, "a/vae")}, "is begun with scale 0.18215, not 0.5"),
        ({"image_size": 64}, "is begun with image_size 48, not 64"),
        ({"flipped": False}, "is begun with flipped True, not False"),
    ],
)
def test_a_folder_of_something_else_is_not_gone_on_with(folder: Path, change: dict, said: str) -> None:
    with pytest.raises(DataError) as error:
        Writer(folder, replace(HEADER, **change))
    assert str(error.value) == f"{folder}: {said}; give another folder, or remove this one"


def test_shards_keep_their_size_when_one_goes_on(tmp_path: Path, folder: Path, files) -> None:
    """Which a later version may choose differently."""
    Writer(tmp_path / "again", HEADER)
    write(tmp_path / "again", replace(HEADER, rows=7))
    assert files(tmp_path / "again") == files(folder)


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(DataError, match="holds other files"):
        Writer(tmp_path, HEADER)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("value", [float("nan"), 1e5])
def test_what_float16_does_not_hold_is_not_written(tmp_path: Path, value: float) -> None:
    a, labels, b = content()
    a = a.float()
    a[1, 0, 0, 0] = value
    with pytest.raises(DataError, match="a latent from 0 on is not finite in float16"):
        Writer(tmp_path / "set", HEADER).append(a[:2], labels[:2], b[:2])


def test_shards_are_neither_small_nor_many() -> None:
    assert writer.shard_rows(1_281_167, (8, 32, 32)) == 10010
    assert writer.shard_rows(1_281_167, (768, 16, 16)) == 10010
    assert writer.shard_rows(1000, (8, 32, 32)) == 4096
    assert writer.shard_rows(3, (2**15, 2**6, 2**6)) == 1


@pytest.mark.parametrize("name", ["shard-00002.npy", "labels-00000.npy", "mirrored-00004.npy"])
def test_a_damaged_file_is_named(folder: Path, name: str, damage) -> None:
    damage(folder / name)
    assert refusal(folder) == f"{name} is damaged, its SHA-256 is not the manifest's"
    (folder / name).write_bytes((folder / name).read_bytes()[:-3])
    size = (folder / name).stat().st_size
    assert refusal(folder) == f"{name} has {size} bytes, not {size + 3}"
    (folder / name).unlink()
    assert refusal(folder) == f"{name}: No such file or directory"


def test_a_check_is_remembered(folder: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    read: list[str] = []
    real = check.sha256
    monkeypatch.setattr(check, "sha256", lambda path: (read.append(path.name), real(path))[1])
    said: list[str] = []
    load(folder, Wanted(6, 4, say=said.append))
    assert len(read) == 15 and len(said) == 1
    load(folder, ANY)
    assert len(read) == 15
    status = (folder / "shard-00001.npy").stat()
    os.utime(folder / "shard-00001.npy", ns=(0, status.st_mtime_ns + 1))
    load(folder, ANY)
    assert read[15:] == ["shard-00001.npy"]
    (cache / "checked.json").write_text("{")
    load(folder, ANY)
    assert len(read) == 31


def test_a_cache_that_cannot_be_written_costs_only_the_check(folder: Path, cache: Path) -> None:
    cache.parent.mkdir(exist_ok=True)
    cache.write_text("a file")
    load(folder, ANY)


def test_a_file_that_changes_during_the_run_is_named(folder: Path) -> None:
    found = load(folder, ANY)
    (folder / "mirrored-00001.npy").write_bytes(b"short")
    found.read(torch.arange(23))
    flags = torch.ones(23, dtype=torch.bool)
    with pytest.raises(DataError) as error:
        found.read(torch.arange(23), flags)
    assert str(error.value) == f"--data {folder}: mirrored-00001.npy has changed during the run"
    (folder / "mirrored-00001.npy").unlink()
    with pytest.raises(DataError, match=r"mirrored-00001\.npy: No such file"):
        found.read(torch.arange(23), flags)


def test_another_shape_or_vae_is_refused_with_both(folder: Path) -> None:
    hint = "set model.in_channels and model.input_size"
    assert refusal(folder, Wanted(8, 4)) == f"the latents are 4 x 6 x 6, the model takes 4 x 8 x 8: {hint}"
    assert refusal(folder, Wanted(6, 16)) == f"the latents are 4 x 6 x 6, the model takes 16 x 6 x 6: {hint}"
    assert refusal(folder, Wanted(6, 4, vae="b")) == "the latents are of the VAE a/vae, not of b"
    load(folder, Wanted(6, 4, vae="a/vae"))


def test_the_checksum_is_of_the_content(folder: Path, tmp_path: Path) -> None:
    first = load(folder, ANY).contents.checksum
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert load(tmp_path / "elsewhere", ANY).contents.checksum == first and len(first) == 64
    write(tmp_path / "other", Header(LAYOUT, 23, 5, True, ("ant", "bee", "cow")))
    assert load(tmp_path / "other", ANY).contents.checksum != first


def put(folder: Path, name: str, values: np.ndarray) -> None:
    """Another array in the place of a file, with the right hash in the manifest."""
    buffer = io.BytesIO()
    np.save(buffer, values)
    (folder / name).write_bytes(buffer.getvalue())
    text = json.loads((folder / "latents.json").read_text())
    kind, number = name.removesuffix(".npy").split("-")
    entry = {"sha256": hashlib.sha256(buffer.getvalue()).hexdigest(), "bytes": len(buffer.getvalue())}
    text["shards"][int(number)]["files"][kind] = entry
    (folder / "latents.json").write_text(json.dumps(text))


def test_wrong_arrays_are_named(folder: Path) -> None:
    put(folder, "labels-00001.npy", np.array([0, 1, 3, 1, 0]))
    assert refusal(folder) == "latent 7 has label 3, not 0 to 2"
    put(folder, "labels-00001.npy", np.array([0, -1, 3, 1, 0]))
    assert refusal(folder) == "latent 6 has label -1, not 0 to 2"
    put(folder, "labels-00001.npy", np.zeros(4, np.int64))
    assert refusal(folder) == "labels-00001.npy is int64 (4,), not int64 (5,)"
    put(folder, "labels-00001.npy", np.array([object()] * 5))
    assert "labels-00001.npy cannot be read" in refusal(folder)
    put(folder, "labels-00001.npy", np.zeros(5, np.int64))
    put(folder, "shard-00003.npy", np.zeros((5, 4, 6, 6), np.float16))
    assert refusal(folder) == "shard-00003.npy is float16 (5, 4, 6, 6), not float16 (5, 8, 6, 6)"


@pytest.mark.parametrize(
    ("place", "value", "what"),
    [
        ((1, 0, 0, 0), np.nan, "latent 1 of it is not finite"),
        ((4, 7, 5, 5), np.inf, "latent 4 of it is not finite"),
        ((2, 3, 0, 0), -np.inf, "latent 2 of it is not finite"),
        ((3, 4, 0, 0), -1e-7, "latent 3 of it has a negative std"),
    ],
)
def test_numbers_that_no_posterior_has_are_named(folder: Path, place: tuple[int, ...], value: float, what: str) -> None:
    whole = np.load(folder / "mirrored-00001.npy")
    whole[0, 0, 0, 0], whole[0, 7, 0, 0] = -3.0, -0.0  # which are right
    put(folder, "mirrored-00001.npy", whole)
    load(folder, ANY)
    whole[place] = value
    put(folder, "mirrored-00001.npy", whole)
    assert refusal(folder) == f"mirrored-00001.npy: {what}"


def test_a_check_of_less_is_not_remembered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an earlier version has left it."""
    whole = np.load(folder / "shard-00001.npy")
    whole[1, 0, 0, 0] = np.nan
    put(folder, "shard-00001.npy", whole)
    monkeypatch.setattr(check, "CHECK", 1)
    monkeypatch.setattr(check, "_check_numbers", lambda *_: None)
    load(folder, ANY)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
    assert refusal(folder) == "shard-00001.npy: latent 1 of it is not finite"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, "latents.json is of format 2; this version reads up to 1, use a later one"),
        *[
            ({"format": value}, f"latents.json is damaged: format is {str(value)!r}")
            for value in (None, "x", 0, 1.5, [])
        ],
        ({"kind": "x"}, "latents.json is no manifest of soflow-fast latents"),
        ({"count": -1}, "latents.json is damaged: count is '-1'"),
        ({"count": True}, "latents.json is damaged: count is 'True'"),
        ({"count": 0}, "latents.json is damaged: 5 shards of 5 for 0 latents"),
        ({"rows": 6}, "latents.json is damaged: 5 shards of 6 for 23 latents"),
        ({"channels": 2**20}, "latents.json latents of 1048576 x 6 x 6 make no sense"),
        ({"scale": [1.0, 2.0]}, "latents.json scale has 2 numbers, the latents 4 channels"),
        ({"scale": float("nan")}, "latents.json scale nan makes no sense"),
        ({"shift": "x"}, "latents.json is damaged: shift is 'x'"),
        ({"shift": 10**400}, "latents.json is damaged (OverflowError: int too large to convert to float)"),
        ({"scale": [1, 1, 1, 10**400]}, "latents.json is damaged (OverflowError: int too large to convert to float)"),
        ({"classes": [1]}, "latents.json is damaged: classes is '[1]'"),
        ({"shards": 5}, "latents.json is damaged (TypeError: 'int' object is not iterable)"),
        ({"shards": [{}]}, "latents.json is damaged (KeyError: 'files')"),
        ({"shards": []}, "only 0 of 23 images are encoded; give the command that encodes them again, it goes on"),
    ],
)
def test_a_damaged_manifest_is_named(folder: Path, change: dict, said: str) -> None:
    values = json.loads((folder / "latents.json").read_text())
    (folder / "latents.json").write_text(json.dumps(values | change))
    assert refusal(folder) == said


@pytest.mark.parametrize("value", [float("inf"), 5.0, "5", True, None, -1])
def test_a_number_of_a_shard_is_whole(folder: Path, value: object) -> None:
    for name in ("count", "bytes"):
        values = json.loads((folder / "latents.json").read_text())
        entry = values["shards"][0]
        (entry if name == "count" else entry["files"]["labels"])[name] = value
        other = folder.parent / name
        shutil.copytree(folder, other)
        (other / "latents.json").write_text(json.dumps(values))
        assert refusal(other) == f"latents.json is damaged: {name} is {str(value)!r}"


def test_a_manifest_that_is_no_json(folder: Path) -> None:
    for text in (b"", b"{", b"[]", b"\xff", b"[" * 100_000, b"null"):
        (folder / "latents.json").write_bytes(text)
        assert refusal(folder).startswith("latents.json ")
    (folder / "latents.json").unlink()
    (folder / "latents.json").mkdir()
    assert not recognises(folder)


def test_every_flipped_bit_of_a_manifest_is_seen_or_harmless(folder: Path) -> None:
    """No other error than DataError, whichever byte is another one."""
    text = (folder / "latents.json").read_bytes()
    for at in range(0, len(text), 7):
        (folder / "latents.json").write_bytes(text[:at] + bytes([text[at] ^ 1]) + text[at + 1 :])
        try:
            load(folder, ANY)
        except DataError as error:
            assert str(error).startswith(f"--data {folder}: ") and "\n" not in str(error)
