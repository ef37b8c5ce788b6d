"""A folder of drawn images: which of its files count as there, and what is written of all at the end."""

import json
import os
import shutil
import weakref
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from soflow_fast.errors import ConfigError, Diverged, StorageError
from soflow_fast.runs import drawn
from soflow_fast.runs.drawn.npz import read_first, write_npz
from soflow_fast.runs.images import from_png

SETTINGS = drawn.Settings(
    n=10,
    seed=0,
    times=(1.0,),
    method="renoise",
    labels="balanced",
    batch_size=4,
    format="png",
    latents=False,
    flow="linear path, euler coefficients",
    weights="a",
    vae="",
)
BATCHES = [range(0, 4), range(4, 8), range(8, 10)]
IMAGES = torch.arange(10 * 2 * 2 * 3, dtype=torch.uint8).reshape(10, 2, 2, 3)
LABELS = torch.arange(10)


class Draw:
    """Gives images of numbers, and keeps which batches were asked for."""

    def __init__(self, settings: drawn.Settings) -> None:
        self.forms = 2 if settings.format == "both" else 1
        self.images = (
            torch.randn(10, 4, 2, 2, generator=torch.Generator().manual_seed(0)) if settings.latents else IMAGES
        )
        self.asked: list[range] = []

    def __call__(self, batches: Iterator[range]) -> Iterator[tuple[Tensor, ...]]:
        for rows in batches:
            self.asked.append(rows)
            yield torch.tensor(True), *[self.images[rows.start : rows.stop]] * self.forms


def filled(out: Path, settings: drawn.Settings, draw: Any = None, overwrite: bool = False) -> list[range]:
    """Fill a folder. Returns the batches that were drawn."""
    draw = draw or Draw(settings)
    with drawn.taken(out, settings, "runs/digits", overwrite, pytest.fail) as folder:
        drawn.fill(folder, BATCHES, draw, LABELS)
    return draw.asked


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


@pytest.mark.parametrize("form", ["png", "npz", "both"])
def test_what_is_written(form: Any, tmp_path: Path) -> None:
    assert filled(tmp_path / "out", replace(SETTINGS, format=form)) == BATCHES
    singly = {f"{i:05d}.png" for i in range(10)} if form != "npz" else set()
    together = {"samples.npz"} if form != "png" else set()
    assert set(os.listdir(tmp_path / "out")) == {".lock", "samples.json", "grid.png"} | singly | together
    for i in range(10 if singly else 0):
        assert torch.equal(from_png((tmp_path / "out" / f"{i:05d}.png").read_bytes()), IMAGES[i])
    if together:
        with np.load(tmp_path / "out" / "samples.npz") as found:
            assert found.files == ["arr_0", "arr_1"]
            assert (found["arr_0"] == IMAGES.numpy()).all() and found["arr_0"].dtype == np.uint8
            assert (found["arr_1"] == np.arange(10)).all() and found["arr_1"].dtype == np.int64
    kept = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert kept["settings"]["format"] == form and kept["settings"]["times"] == [1.0]
    assert kept["made_by"]["run"] == "digits" and kept["made_by"]["torch"] == torch.__version__


def test_the_grid_is_the_same_of_files_and_of_arrays(tmp_path: Path) -> None:
    for form in ("png", "npz"):
        filled(tmp_path / form, replace(SETTINGS, format=form))
    assert (tmp_path / "png" / "grid.png").read_bytes() == (tmp_path / "npz" / "grid.png").read_bytes()


@pytest.mark.parametrize("latents", [False, True])
def test_what_is_whole_stays_and_the_rest_is_drawn(latents: bool, tmp_path: Path) -> None:
    out, settings = tmp_path / "out", replace(SETTINGS, latents=latents)
    filled(out, settings)
    before = contents(out)
    assert filled(out, settings) == [] and contents(out) == before
    ending = "npy" if latents else "png"
    damages: dict[str, Callable[[bytes], bytes]] = {
        f"00001.{ending}": lambda content: content[:-1],
        f"00005.{ending}": lambda content: b"",
        f"00009.{ending}": lambda content: b"\0" * len(content),
    }
    for name, damage in damages.items():
        (out / name).write_bytes(damage(before[name]))
    assert filled(out, settings) == BATCHES and contents(out) == before
    (out / f"00006.{ending}").unlink()
    (out / f".00007.{ending}.partial-99").touch()
    assert filled(out, settings) == [BATCHES[1]] and contents(out) == before
    if not latents:  # checksums tell it of these; a .npy was on the disk before it had its name
        (out / "00002.png").write_bytes(before["00002.png"].replace(b"IDAT", b"IDAU"))
        (out / "grid.png").write_bytes(before["grid.png"][:40])
        assert filled(out, settings) == [BATCHES[0]] and contents(out) == before


@pytest.mark.parametrize("form", ["npz", "both"])
def test_pieces_of_the_arrays_stay_until_these_are_there(form: Any, tmp_path: Path) -> None:
    out, settings = tmp_path / "out", replace(SETTINGS, format=form)
    filled(out, settings)
    before = contents(out)

    class Failing(Draw):
        def __call__(self, batches: Iterator[range]) -> Iterator[tuple[Tensor, ...]]:
            for number, made in enumerate(super().__call__(batches)):
                if number == 2:
                    raise OSError(28, "No space left on device")
                yield made

    again = tmp_path / "again"
    with pytest.raises(StorageError, match=r"--out .*again: No space left on device"):
        filled(again, settings, Failing(settings))
    assert sorted(os.listdir(again / ".parts")) == ["00000.npy", "00004.npy"]
    assert filled(again, settings) == [BATCHES[2]] and contents(again) == before
    (again / ".parts").mkdir()  # a kill between the last two steps
    (again / ".parts" / "00000.npy").touch()
    assert filled(again, settings) == [] and contents(again) == before and not (again / ".parts").exists()


@pytest.mark.parametrize("form", ["npz", "both"])
def test_arrays_that_are_not_those_written_are_written_again(form: Any, tmp_path: Path) -> None:
    out, settings = tmp_path / "out", replace(SETTINGS, format=form)
    filled(out, settings)
    before = contents(out)
    archive, whole = out / "samples.npz", before["samples.npz"]
    write_npz(tmp_path / "foreign.npz", [255 - IMAGES.numpy()], (10, 2, 2, 3), LABELS)  # in shape and checksums right
    for content in (b"", whole[:-1], whole.replace(b"\x05\x06\x07", b"\x05\x07\x07"), b"\0" * len(whole)):
        assert content != whole
        archive.write_bytes(content)
        assert filled(out, settings) == BATCHES and contents(out) == before and not (out / ".parts").exists()
    shutil.copy(tmp_path / "foreign.npz", archive)
    assert filled(out, settings) == BATCHES and contents(out) == before
    archive.unlink()
    archive.symlink_to(tmp_path / "foreign.npz")
    with pytest.raises(StorageError, match=r"samples\.npz: is a link"):
        filled(out, settings)
    archive.unlink()
    archive.mkdir()
    (archive / "note.txt").touch()
    (out / "samples.json").write_text(settings.to_json("digits"))
    for asked in (settings, replace(settings, seed=1)):
        with pytest.raises(StorageError, match=r"samples\.npz: Is a directory"):
            filled(out, asked, overwrite=True)
    assert os.listdir(archive) == ["note.txt"]


def test_arrays_count_when_the_manifest_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between the two draws nothing again: the pieces are there until then."""
    out, settings = tmp_path / "out", replace(SETTINGS, format="npz")
    with monkeypatch.context() as patched:

        def killed(self: drawn.Folder) -> None:
            raise KeyboardInterrupt

        patched.setattr(drawn.Folder, "end", killed)
        with pytest.raises(KeyboardInterrupt):
            filled(out, settings)
    assert (out / "samples.npz").exists()
    assert filled(out, settings) == []
    filled(tmp_path / "other", settings)
    assert contents(out) == contents(tmp_path / "other") and not (out / ".parts").exists()
    (out / "samples.json").write_text(settings.to_json("digits"))  # without the SHA-256, nobody knows whose it is
    assert filled(out, settings) == BATCHES and contents(out) == contents(tmp_path / "other")


@pytest.mark.parametrize("form", ["npz", "both"])
def test_what_is_lost_beside_whole_arrays_is_made_again(form: Any, tmp_path: Path) -> None:
    out, settings = tmp_path / "out", replace(SETTINGS, format=form)
    filled(out, settings)
    before = contents(out)
    written = (out / "samples.npz").stat().st_mtime_ns
    (out / "grid.png").unlink()
    assert filled(out, settings) == [] and contents(out) == before
    (out / "grid.png").write_bytes(before["grid.png"][:40])
    assert filled(out, settings) == [] and contents(out) == before
    if form == "both":
        (out / "00001.png").write_bytes(before["00001.png"][:-1])
        (out / "00009.png").unlink()
        assert filled(out, settings) == [BATCHES[0], BATCHES[2]] and contents(out) == before
    assert (out / "samples.npz").stat().st_mtime_ns == written and not (out / ".parts").exists()


def test_the_first_arrays_are_read_alone(tmp_path: Path) -> None:
    write_npz(tmp_path / "a.npz", [IMAGES.numpy()], (10, 2, 2, 3), LABELS)
    for count in (1, 3, 10):
        assert torch.equal(torch.from_numpy(read_first(tmp_path / "a.npz", count)), IMAGES[:count])


def test_samples_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    def draw(batches: Iterable[range]) -> Iterator[tuple[Tensor, ...]]:
        yield from ((torch.tensor(rows.start < 4), IMAGES[rows.start : rows.stop]) for rows in batches)

    with (
        pytest.raises(Diverged, match=r"^runs/digits: its samples are not finite"),
        drawn.taken(tmp_path / "out", SETTINGS, "runs/digits", False, pytest.fail) as folder,
    ):
        drawn.fill(folder, BATCHES, draw, LABELS)
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {f"{i:05d}.png" for i in range(4)}


def test_another_commands_images_are_refused_or_removed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    filled(out, replace(SETTINGS, seed=7, format="both"))
    (out / "note.txt").write_text("mine")
    before = contents(out)
    text = "holds images of another command \\(seed 7, not 0; format 'both', not 'png'; of other weights\\)"
    with pytest.raises(ConfigError, match=f"--out .*out: {text}; give another folder, or --overwrite"):
        filled(out, replace(SETTINGS, weights="b"))
    assert contents(out) == before
    with drawn.taken(out, replace(SETTINGS, n=4), "run", True, pytest.fail) as folder:
        drawn.fill(folder, BATCHES[:1], Draw(SETTINGS), LABELS)
    names = {".lock", "samples.json", "grid.png", "note.txt", *(f"{i:05d}.png" for i in range(4))}
    assert set(os.listdir(out)) == names and (out / "grid.png").read_bytes() != before["grid.png"]


def test_other_files_are_refused_and_stay(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "note.txt").write_text("mine")
    (out / "00001.png").write_bytes(b"of another program")
    with pytest.raises(ConfigError, match=r"holds 00001.png, which is not of this command"):
        filled(out, SETTINGS)
    assert sorted(os.listdir(out)) == ["00001.png", "note.txt"]
    assert filled(out, SETTINGS, overwrite=True) == BATCHES
    assert (out / "note.txt").read_text() == "mine"
    assert torch.equal(from_png((out / "00001.png").read_bytes()), IMAGES[1])
    assert filled(out, SETTINGS) == []


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"kind": "soflow-fast samples", "settings": 1}', "\0"])
def test_a_manifest_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    filled(out, SETTINGS)
    before = (out / "samples.json").read_text()
    (out / "samples.json").write_text(text)
    with pytest.raises(ConfigError, match=r"samples.json is (damaged|no manifest of samples); give another"):
        filled(out, SETTINGS)
    assert filled(out, SETTINGS, overwrite=True) == BATCHES and (out / "samples.json").read_text() == before


def test_a_folder_without_an_image_is_nobodys(tmp_path: Path) -> None:
    """As after a first batch that did not fit into memory: a smaller one may follow."""

    def draw(batches: Iterable[range]) -> Iterator[tuple[Tensor, ...]]:
        raise MemoryError
        yield ()

    with (
        pytest.raises(MemoryError),
        drawn.taken(tmp_path / "new", replace(SETTINGS, format="both"), "run", False, pytest.fail) as folder,
    ):
        drawn.fill(folder, BATCHES, draw, LABELS)
    assert os.listdir(tmp_path) == []
    (tmp_path / "old").mkdir()
    with (
        pytest.raises(MemoryError),
        drawn.taken(tmp_path / "old", replace(SETTINGS, format="both"), "run", False, pytest.fail) as folder,
    ):
        drawn.fill(folder, BATCHES, draw, LABELS)
    assert os.listdir(tmp_path / "old") == [".lock"]
    (tmp_path / "old" / "samples.json").write_text(replace(SETTINGS, seed=1).to_json("run"))  # a kill before the first
    (tmp_path / "old" / ".parts").mkdir()
    assert filled(tmp_path / "old", replace(SETTINGS, batch_size=2)) == BATCHES


def test_one_process_draws_into_a_folder(tmp_path: Path) -> None:
    with (
        drawn.taken(tmp_path / "out", SETTINGS, "run", False, pytest.fail),
        pytest.raises(ConfigError, match="another process draws into it"),
    ):
        filled(tmp_path / "out", SETTINGS)


def test_the_arrays_are_written_piece_by_piece(tmp_path: Path) -> None:
    """So that they need not lie in memory; and the bytes are the same every time."""
    pieces: list[weakref.ref[np.ndarray]] = []

    def piece(k: int) -> np.ndarray:
        made = np.full((20, 8, 8, 3), k, np.uint8)
        pieces.append(weakref.ref(made))
        assert sum(known() is not None for known in pieces) <= 2  # the one before may just have been written
        return made

    for name in ("a.npz", "b.npz"):
        write_npz(tmp_path / name, map(piece, range(50)), (1000, 8, 8, 3), None)
    assert len(pieces) == 100
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz") as found:
        assert found.files == ["arr_0"] and (found["arr_0"][:, 0, 0, 0] == np.arange(1000) // 20).all()
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert archive.testzip() is None and archive.infolist()[0].compress_type == zipfile.ZIP_STORED

    def broken() -> Iterator[np.ndarray]:
        yield np.zeros((20, 8, 8, 3), np.uint8)
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        write_npz(tmp_path / "c.npz", broken(), (1000, 8, 8, 3), None)
    assert sorted(os.listdir(tmp_path)) == ["a.npz", "b.npz"]
