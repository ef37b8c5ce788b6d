"""Latents as others store them: real files of the real libraries, read, damaged, and converted."""

import io
import json
import multiprocessing
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from soflow_fast.data import identity, latent_formats
from soflow_fast.data.dataset import Wanted
from soflow_fast.data.formats import open_dataset
from soflow_fast.data.latent_formats import pickled
from soflow_fast.data.latent_formats.arrays import std_of
from soflow_fast.data.latent_formats.files import by_path
from soflow_fast.data.latent_formats.foreign import Foreign
from soflow_fast.data.latents import load as load_ours
from soflow_fast.errors import DataError
from soflow_fast.runs.latents import encoding

N = 12
ANY = Wanted(0, 0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class Made(NamedTuple):
    """A place, and what is to be read of it."""

    place: Path
    rows: np.ndarray
    labels: list[int]
    twins: np.ndarray | None = None
    scale: Any = 0.18215
    shift: Any = 0.0


RANDOM = np.random.RandomState(0)
MEAN, TWIN = RANDOM.randn(2, N, 4, 6, 6).astype(np.float32)
LOGVAR = (RANDOM.randn(N, 4, 6, 6) * 3 - 4).astype(np.float32)
LOGVAR[0, 0, 0, 0], LOGVAR[1, 0, 0, 0] = -40, 25  # are clipped
STD = np.exp(0.5 * LOGVAR.astype(np.float64).clip(-30, 20)).astype(np.float32)
MOMENTS, MOMENTS_FLIP = (np.concatenate([m, LOGVAR], 1) for m in (MEAN, TWIN))
ROWS, TWINS = (np.concatenate([m, STD], 1) for m in (MEAN, TWIN))
LABELS = [3, 0, 1, 2, 3, 3, 1, 0, 2, 2, 0, 1]


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def h5(path: Path, rows: np.ndarray, labels: Any, **more: Any) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        file.create_dataset("latents", shape=rows.shape, dtype=np.float32)[:] = rows
        file.create_dataset("labels", data=np.asarray(labels, np.int64))
        for name, value in more.items():
            file.create_dataset(name, data=np.array(value, np.int64))


def hdf5(place: Path) -> Made:
    h5(place / "imagenet_latent.hdf5", ROWS, LABELS, amount=N, latent_size=6)
    return Made(place, ROWS, LABELS)


def hdf5_file(place: Path) -> Made:
    return hdf5(place)._replace(place=place / "imagenet_latent.hdf5")


def hdf5_parts(place: Path) -> Made:
    for rank in range(12):  # more than ten: 10 comes after 9
        h5(place / f"imagenet_latent_part_{rank}.hdf5", ROWS[rank : rank + 1], LABELS[rank : rank + 1])
    return Made(place, ROWS, LABELS)


def lightningdit(place: Path) -> Made:
    rows, twins = (np.concatenate([m, m + 1], 1) for m in (MEAN, TWIN))
    for shard, part in enumerate([slice(0, 7), slice(7, N)]):
        tensors = {"latents": rows[part], "latents_flip": twins[part], "labels": np.array(LABELS[part])}
        save_file(
            {k: torch.tensor(v) for k, v in tensors.items()}, place / f"latents_rank00_shard00{shard}.safetensors"
        )
    mean, std = (torch.tensor(f(rows, (0, 2, 3), keepdims=True)) for f in (np.mean, np.std))
    torch.save({"mean": mean, "std": std}, place / "latents_stats.pt")
    scale, shift = ((1 / std).flatten().tolist(), mean.flatten().tolist())
    return Made(place, rows, LABELS, twins, scale, shift)


def edm2_names() -> list[str]:
    return [f"0000{i // 5}/img-mean-std-{i:08d}.npy" for i in range(N)]


def edm2(place: Path) -> Made:
    for i, name in enumerate(edm2_names()):
        (place / name).parent.mkdir(exist_ok=True, parents=True)
        (place / name).write_bytes(npy(ROWS[i]))
    labels = [[name, label] for name, label in zip(edm2_names(), LABELS, strict=True)]
    (place / "dataset.json").write_text(json.dumps({"labels": labels[::-1]}))
    return Made(place, ROWS, LABELS)


def repa(place: Path) -> Made:
    (place / "images").mkdir()
    (place / "vae-sd").mkdir()
    return edm2(place / "vae-sd")._replace(place=place)


def edm2_zip(place: Path, method: int = zipfile.ZIP_STORED) -> Made:
    made = edm2(place / "folder")
    with zipfile.ZipFile(place / "set.zip", "w", method) as archive:
        for path in sorted(made.place.rglob("*.*")):
            archive.write(path, path.relative_to(made.place).as_posix())
    return made._replace(place=place / "set.zip")


def edm2_zip_deflated(place: Path) -> Made:
    return edm2_zip(place, zipfile.ZIP_DEFLATED)


def lmdb_of(place: Path, entries: dict[str, bytes]) -> Path:
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(place / "db"), map_size=2**24) as env, env.begin(write=True) as transaction:
        for key, value in entries.items():
            transaction.put(key.encode(), value)
    return place / "db"


def meanflow_entries(protocol: int = 4) -> dict[str, bytes]:
    entries = {
        f"{i}": pickle.dumps(
            {
                "moments": MOMENTS[i],
                "moments_flip": MOMENTS_FLIP[i],
                "label": LABELS[i],
                "filename": f"n{i:08d}/{i}.JPEG",
            },
            protocol=protocol,
        )
        for i in range(N)
    }
    return entries | {"num_samples": str(N).encode(), "created_at": b"2025-07-01"}


def meanflow_lmdb(place: Path) -> Made:
    return Made(lmdb_of(place, meanflow_entries()), ROWS, LABELS, TWINS)


def maskdit_lmdb(place: Path) -> Made:
    entries = {f"z-{i}": MOMENTS[i].tobytes() for i in range(N)}
    entries |= {f"y-{i}": str(LABELS[i]).encode() for i in range(N)}
    return Made(lmdb_of(place, entries | {"length": str(N).encode()}), ROWS, LABELS)


def fast_dit(place: Path) -> Made:
    for name in ("features", "labels"):
        (place / f"imagenet256_{name}").mkdir()
    for i in range(N):
        (place / "imagenet256_features" / f"{i}.npy").write_bytes(npy(MEAN[i : i + 1]))
        (place / "imagenet256_labels" / f"{i}.npy").write_bytes(npy(np.array(LABELS[i : i + 1])))
    return Made(place, MEAN, LABELS, scale=1.0)


ORDER = sorted(range(N), key=lambda i: (LABELS[i], i))
"""Of files in folders by class."""


def each(place: Path, suffix: str, write: Callable[[Path, int], None]) -> Path:
    for i in range(N):
        path = place / f"n{LABELS[i]}" / f"{i}{suffix}"
        path.parent.mkdir(exist_ok=True)
        write(path, i)
    return place


def mar_npz(place: Path) -> Made:
    each(place, ".JPEG.npz", lambda path, i: np.savez(path, moments=MOMENTS[i], moments_flip=MOMENTS_FLIP[i]))
    order = sorted(range(N), key=lambda i: (LABELS[i], f"{i}.JPEG"))
    return Made(place, ROWS[order], [LABELS[i] for i in order], TWINS[order])


def pt_moments_of_numpy(place: Path) -> Made:
    each(place, ".pt", lambda path, i: torch.save({"moments": MOMENTS[i], "moments_flip": MOMENTS_FLIP[i]}, path))
    return Made(place, ROWS[ORDER], sorted(LABELS), TWINS[ORDER])


def pt_tensor_with_std(place: Path) -> Made:
    each(place, ".pt", lambda path, i: torch.save(torch.tensor(ROWS[i]), path))
    return Made(place, ROWS[ORDER], sorted(LABELS))


def pt_sample(place: Path) -> Made:
    each(place, ".pt", lambda path, i: torch.save({"latent": torch.tensor(MEAN[i])[None]}, path))
    return Made(place, MEAN[ORDER], sorted(LABELS), scale=1.0)


def pt_mean_and_std(place: Path) -> Made:
    each(place, ".pt", lambda path, i: torch.save({"mean": torch.tensor(MEAN[i]), "std": torch.tensor(STD[i])}, path))
    return Made(place, ROWS[ORDER], sorted(LABELS))


def pt_with_labels(place: Path) -> Made:
    for i in range(N):
        torch.save({"latent": torch.tensor(MEAN[i]), "label": torch.tensor(LABELS[i])}, place / f"{i}.pt")
    return Made(place, MEAN, LABELS, scale=1.0)


MAKERS = (
    *(hdf5, hdf5_file, hdf5_parts, lightningdit, edm2, repa, edm2_zip, edm2_zip_deflated, meanflow_lmdb, maskdit_lmdb),
    *(fast_dit, mar_npz, pt_moments_of_numpy, pt_tensor_with_std, pt_sample, pt_mean_and_std, pt_with_labels),
)
Maker = Callable[[Path], Made]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "foreign").mkdir()
    return tmp_path / "foreign"


@pytest.fixture(params=MAKERS, ids=lambda maker: maker.__name__)
def made(request: pytest.FixtureRequest, place: Path) -> Made:
    return request.param(place)


def half(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values).half()


def test_every_format_is_read(made: Made) -> None:
    assert latent_formats.recognises(made.place)
    channels = len(made.scale) if isinstance(made.scale, list) else 4
    found = latent_formats.load(made.place, Wanted(6, channels))
    assert len(found) == N and found.shape == (channels, 6, 6) and found.labels.tolist() == made.labels
    assert len(found.contents.classes) == 4 and found.contents.kind and len(found.contents.checksum) == 64
    index = torch.tensor([11, 3, 0, 3])
    raw = found.read(index)
    assert raw.dtype == torch.float16 and torch.equal(raw, half(made.rows)[index])
    assert found.mirrors == (made.twins is not None)
    if made.twins is not None:
        flags = torch.tensor([True, False, True, True])
        rows = torch.where(flags[:, None, None, None], half(made.twins)[index], half(made.rows)[index])
        assert torch.equal(found.read(index, flags), rows)
    eps = torch.randn(4, channels, 6, 6)
    x = raw.double()
    x = x[:, :channels] + x[:, channels:] * eps if raw.shape[1] > channels else x
    scale, shift = (torch.tensor(value).view(-1, 1, 1) for value in (made.scale, made.shift))
    torch.testing.assert_close(
        found.decoded(raw, lambda shape: eps).double(), (x - shift) * scale, atol=1e-5, rtol=1e-5
    )


def test_every_format_is_converted(made: Made, tmp_path: Path) -> None:
    found = latent_formats.load(made.place, ANY)
    encoding.convert(found, tmp_path / "ours", "a/vae")
    ours = load_ours(tmp_path / "ours", ANY)
    everything = torch.arange(N)
    assert torch.equal(ours.read(everything), found.read(everything)) and torch.equal(ours.labels, found.labels)
    assert torch.equal(ours.read(everything), half(made.rows))
    if made.twins is not None:
        assert torch.equal(ours.read(everything, torch.ones(N, dtype=torch.bool)), half(made.twins))
    assert ours.layout.scale == found.layout.scale and ours.layout.vae == "a/vae"
    assert ours.contents.classes == found.contents.classes


def test_processes_read_for_themselves(made: Made) -> None:
    found = latent_formats.load(made.place, ANY)
    found.read(torch.arange(2))  # opens what there is to be opened
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for raw in pool.map(found.read, [torch.arange(N)] * 4):
            assert torch.equal(raw, half(made.rows))
    again = pickle.loads(pickle.dumps(found))
    assert torch.equal(again.read(torch.arange(N)), half(made.rows))


@pytest.mark.parametrize("change", ["cut off", "touched", "replaced", "gone"])
def test_a_file_that_changes_after_it_was_found_is_refused(made: Made, change: str) -> None:
    found = latent_formats.load(made.place, ANY)
    found.read(torch.arange(N))  # opens what there is to be opened
    assert isinstance(found, Foreign)
    path = found._files.path(found.file(5))
    status = path.stat()
    if change == "cut off":
        os.truncate(path, status.st_size // 2)
    elif change == "touched":
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    elif change == "replaced":
        path.with_name("new").write_bytes(path.read_bytes())
        path.with_name("new").replace(path)
    else:
        path.unlink()
    said = f"{path.name} cannot be read (FileNotFoundError" if change == "gone" else "has changed during the run"
    with pytest.raises(DataError, match=re.escape(said)) as error:
        found.read(torch.arange(N))
    assert path.name in str(error.value)


@pytest.mark.parametrize("maker", [hdf5, lightningdit, edm2, edm2_zip, fast_dit, mar_npz])
def test_a_file_that_is_cut_off_while_it_is_read_is_refused(
    place: Path, maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = latent_formats.load(maker(place).place, ANY)
    assert isinstance(found, Foreign)
    plain, path = found.row, found._files.path(found.file(5))

    def row(number: int, mirrored: bool) -> np.ndarray:
        if path.stat().st_size > 100:
            os.truncate(path, 100)
        return plain(number, mirrored)

    monkeypatch.setattr(found, "row", row)
    with pytest.raises(DataError, match=f"{re.escape(path.name)} has changed during the run"):
        found.read(torch.tensor([5]))


def test_the_same_content_has_the_same_checksum_elsewhere_and_when_converted(made: Made, tmp_path: Path) -> None:
    found = identity.identify(latent_formats.load(made.place, ANY))
    if made.place.is_dir():
        moved = made.place.rename(tmp_path / "moved")
    else:
        moved = made.place.rename(tmp_path / f"moved{made.place.suffix}")
    elsewhere = latent_formats.load(moved, ANY)
    assert identity.identify(elsewhere) == found
    encoding.convert(elsewhere, tmp_path / "ours")
    ours = identity.identify(load_ours(tmp_path / "ours", ANY))
    assert ours.checksum != found.checksum
    assert identity.changes(found, ours) == identity.changes(ours, found) == []


def checksums(*places: Path) -> list[str]:
    return [latent_formats.load(place, ANY).contents.checksum for place in places]


def test_the_checksum_is_of_content_alone(place: Path) -> None:
    for name in ("a", "b", "c", "h", "p"):
        (place / name).mkdir()
    edm2(place / "a")
    zipped = edm2_zip(place / "b").place
    hdf5(place / "h")
    hdf5_parts(place / "p")
    same = checksums(place / "a", zipped, place / "h", place / "p")
    assert same == same[:1] * 4
    row, label = ROWS.copy(), [*LABELS[:-1], 2]
    row[5, 0, 0, 0] += 1
    for rows, labels in ((row, LABELS), (ROWS, label)):
        h5(place / "c" / "imagenet_latent.hdf5", rows, labels)
        assert checksums(place / "c") != same[:1]


def test_the_checksum_is_of_rows_from_the_first_to_the_last(place: Path) -> None:
    rows = np.random.RandomState(1).rand(1000, 8, 2, 2).astype(np.float32)
    found = []
    for changed in (None, 0, 999, 1):
        other = rows.copy()
        if changed is not None:
            other[changed] += 1
        h5(place / "imagenet_latent.hdf5", other, np.arange(1000) % 7)
        found += checksums(place)
    assert len(set(found)) == 3 and found[0] == found[3]  # the second is none of the 64


def test_the_std_of_a_log_variance_is_rounded_once() -> None:
    """In float32 processors differ in the last place of exp, which float16 would round up or down."""
    std = std_of(LOGVAR)
    assert std.dtype == np.float64 and np.array_equal(std.astype(np.float16), STD.astype(np.float16))


@pytest.mark.parametrize("order", ["abcd", "dcba", "bdac"])
def test_names_of_one_stem_have_an_order(place: Path, order: str) -> None:
    for name in order:
        (place / f"v1.{name}").mkdir()
        for suffix in (".pt", ".b.pt"):
            torch.save(torch.full((4, 2, 2), float(ord(name))), place / f"v1.{name}" / f"0{suffix}")
    found = latent_formats.load(place, ANY)
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert found.read(torch.arange(8))[:, 0, 0, 0].tolist() == [97, 97, 98, 98, 99, 99, 100, 100]
    names = ["a.x/0.pt", "a.y/0.npz", "a.y/0.pt", "a.y/1.pt", "a.y/10.pt", "a.z/0.pt", "x.pt"]
    for seed in range(20):
        assert sorted(np.random.RandomState(seed).permutation(names).tolist(), key=by_path) == names


def test_numbers_as_names_have_one_order_in_folder_and_zip(place: Path) -> None:
    names = [f"{i // 3}/{i}.npy" for i in range(N)]
    (place / "folder").mkdir()
    with zipfile.ZipFile(place / "set.zip", "w") as archive:
        for name, row in zip(names, ROWS, strict=True):
            (place / "folder" / name).parent.mkdir(exist_ok=True)
            (place / "folder" / name).write_bytes(npy(row))
            archive.writestr(name, npy(row))
        archive.writestr("__MACOSX/0/._0.npy", b"of the Finder")
        (place / "folder" / "dataset.json").write_text(json.dumps({"labels": list(zip(names, LABELS, strict=True))}))
        archive.write(place / "folder" / "dataset.json", "dataset.json")
    both = [latent_formats.load(place / name, ANY) for name in ("folder", "set.zip")]
    for found in both:
        assert found.labels.tolist() == LABELS and torch.equal(found.read(torch.arange(N)), half(ROWS))
    assert identity.identify(both[0]) == identity.identify(both[1])


def test_the_wrong_shape_is_refused_with_both(made: Made) -> None:
    with pytest.raises(DataError) as error:
        latent_formats.load(made.place, Wanted(64, 7))
    text = str(error.value)
    assert text.startswith(f"--data {made.place}: the latents are ") and "the model takes 7 x 64 x 64" in text


def outcome(place: Path, wanted: Wanted = ANY) -> str:
    """The one line by which a place is refused, without its path; "" if all can be read."""
    try:
        found = latent_formats.load(place, wanted)
        found.read(torch.arange(len(found)))
    except DataError as error:
        text = str(error)
        assert text.startswith(f"--data {place}: ") and "\n" not in text and len(text) < 600
        return text.removeprefix(f"--data {place}: ")
    return ""


def files_of(place: Path) -> list[Path]:
    return sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]


def test_files_that_are_cut_off_are_named(made: Made) -> None:
    if (made.place / "data.mdb").exists():
        return  # `test_an_lmdb_that_is_cut_off_is_refused`
    for path in [*files_of(made.place)[:2], files_of(made.place)[-1]]:
        content = path.read_bytes()
        for length in (0, 1, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:length])
            said = outcome(made.place)
            assert said and (path.stem in said or path == made.place or "holds no latents" in said), (path, said)
        path.write_bytes(content)
    assert outcome(made.place) == ""


def test_flipped_bytes_are_a_refusal_or_other_numbers(made: Made) -> None:
    """But never another error, whichever byte of the ends of a file it is."""
    for path in [files_of(made.place)[0], files_of(made.place)[-1]]:
        content = path.read_bytes()
        if path.suffix in (".mdb", ".hdf5"):
            positions = [8, 20, *range(len(content) // 3, len(content), len(content) // 5)]
        else:
            positions = [*range(0, min(len(content), 300), 11), *range(max(0, len(content) - 200), len(content), 17)]
        for at in positions:
            path.write_bytes(content[:at] + bytes([content[at] ^ 0x11]) + content[at + 1 :])
            outcome(made.place)
        path.write_bytes(content)


def test_nothing_else_is_recognised(tmp_path: Path) -> None:
    for name, content in {"a.txt": b"x", "b.zip": b"PK\3\4", "c.npz": b"PK", "d.hdf5": b"", "e.mdb2": b""}.items():
        (tmp_path / name).write_bytes(content)
        assert not latent_formats.recognises(tmp_path / name)
    assert not latent_formats.recognises(tmp_path) and not latent_formats.recognises(tmp_path / "nothing")
    assert not latent_formats.recognises(Path("a\0b"))
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert not latent_formats.recognises(tmp_path) and not latent_formats.recognises(tmp_path / "pipe.safetensors")
    with pytest.raises(DataError, match="holds no latents in a known format"):
        latent_formats.load(tmp_path, ANY)


# HDF5


def test_parts_must_be_complete_and_not_beside_the_merged_file(place: Path) -> None:
    hdf5_parts(place)
    (place / "imagenet_latent_part_4.hdf5").unlink()
    assert outcome(place) == "imagenet_latent_part_4.hdf5 is missing"
    hdf5(place)
    said = "imagenet_latent_part_0.hdf5 lies beside imagenet_latent.hdf5: the merge was not finished"
    assert outcome(place) == said


@pytest.mark.parametrize(
    ("rows", "labels", "more", "said"),
    [
        (ROWS, [*LABELS[:-1], -1], {}, "imagenet_latent.hdf5, latent 11, has label -1, not 0 to 1048575"),
        (ROWS, [*LABELS[:-1], 2**40], {}, f"imagenet_latent.hdf5, latent 11, has label {2**40}, not 0 to 1048575"),
        (ROWS, LABELS[:-1], {}, "has (11,) labels for 12 latents"),
        (ROWS[:, :7], LABELS, {}, "latents are (12, 7, 6, 6), not [N, 2C, S, S]"),
        (ROWS[0], LABELS[:8], {}, "latents are (8, 6, 6), not [N, 2C, S, S]"),
        (ROWS, LABELS, {"amount": 13}, "says amount 13, its latents 12"),
        (ROWS, LABELS, {"latent_size": 32}, "says latent_size 32, its latents 6"),
        (ROWS * (np.arange(N) < 11)[:, None, None, None], LABELS, {}, "its last latent is all 0: the encoding was not"),
        (-ROWS, LABELS, {}, "imagenet_latent.hdf5, latent 0, has a std below 0: is it a log-variance?"),
        (ROWS * np.float32("nan"), LABELS, {}, "imagenet_latent.hdf5, latent 0, is not finite in float16"),
    ],
)
def test_wrong_hdf5_is_named(place: Path, rows: np.ndarray, labels: list[int], more: dict, said: str) -> None:
    h5(place / "imagenet_latent.hdf5", rows, labels, **more)
    assert said in outcome(place) and "imagenet_latent.hdf5" in outcome(place)


def test_hdf5_without_its_keys_or_with_links_elsewhere(place: Path) -> None:
    h5py = pytest.importorskip("h5py")
    hdf5(place)
    path = place / "imagenet_latent.hdf5"
    for name in ("latents", "labels"):
        shutil.copy(path, place / "other")
        with h5py.File(path, "a") as file:
            del file[name]
        assert f"holds no {name}" in outcome(place)
        with h5py.File(path, "a") as file:
            file[name] = h5py.ExternalLink(str(place / "other"), f"/{name}")
        assert f"holds no {name}" in outcome(place)
        with h5py.File(path, "a") as file:
            del file[name]
            file.create_group(name)
        assert f"{name} are no numbers of this file" in outcome(place)
        shutil.move(place / "other", path)
    (place / "raw").write_bytes(ROWS.tobytes())
    with h5py.File(path, "a") as file:
        del file["latents"]
        file.create_dataset("latents", ROWS.shape, np.float32, external=[(str(place / "raw"), 0, ROWS.nbytes)])
    assert "latents are no numbers of this file" in outcome(place)


@pytest.mark.parametrize("package", ["h5py", "lmdb"])
def test_a_missing_package_is_named(place: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = hdf5(place) if package == "h5py" else meanflow_lmdb(place)
    monkeypatch.setitem(__import__("sys").modules, package, None)
    assert f"needs {package}: pip install 'soflow-fast[latents]'" in outcome(made.place)


def test_parts_bear_numbers_with_zeros_before_them(place: Path) -> None:
    for rank in range(N):
        h5(place / f"imagenet_latent_part_{rank:02}.hdf5", ROWS[rank : rank + 1], LABELS[rank : rank + 1])
    assert torch.equal(latent_formats.load(place, ANY).read(torch.arange(N)), half(ROWS))
    shutil.copy(place / "imagenet_latent_part_03.hdf5", place / "imagenet_latent_part_3.hdf5")
    assert outcome(place) == "imagenet_latent_part_03.hdf5 and imagenet_latent_part_3.hdf5 are the same part"


def test_what_hdf5_says_of_itself_is_a_number_of_its_own(place: Path) -> None:
    h5py = pytest.importorskip("h5py")
    hdf5(place)
    path = place / "imagenet_latent.hdf5"
    shutil.copy(path, place / "other")
    for value, said in (
        (12.7, "says amount 12.7, its latents 12"),
        ([12], "says amount (1,), its latents 12"),
        ("12", "amount are no numbers of this file"),
        (h5py.ExternalLink(str(place / "other"), "/amount"), "holds no amount"),
        (h5py.SoftLink("/latent_size"), "holds no amount"),
    ):
        with h5py.File(path, "a") as file:
            del file["amount"]
            file["amount"] = value
        assert said in outcome(place)
    with h5py.File(path, "a") as file:
        del file["amount"]
    assert outcome(place) == ""


# Safetensors


def test_wrong_safetensors_are_named(place: Path) -> None:
    lightningdit(place)
    shard = place / "latents_rank00_shard001.safetensors"
    good = {name: torch.zeros(5, 8, 6, 6) for name in ("latents", "latents_flip")} | {"labels": torch.zeros(5).long()}
    for change, said in (
        ({"latents": torch.zeros(4, 8, 6, 6)}, "holds latents"),
        ({"latents_flip": torch.zeros(5, 8, 6, 7)}, "holds latents"),
        ({"latents": torch.zeros(5, 8, 36), "latents_flip": torch.zeros(5, 8, 36)}, "holds latents"),
        ({"labels": torch.zeros(5)}, "its labels are no whole numbers"),
        ({"labels": torch.ones(5, dtype=torch.bool)}, "its labels are no whole numbers"),
        ({"latents": torch.zeros(5, 8, 6, 6).to(torch.int32)}, "holds latents in I32"),
        ({"labels": torch.full((5,), -2)}, "latent 0, has label -2, not 0 to"),
        ({"latents": torch.full((5, 8, 6, 6), 1e9)}, "latent 0, is not finite in float16"),
    ):
        save_file(good | change, shard)
        assert shard.name in outcome(place) and said in outcome(place)
    save_file({"latents": good["latents"]}, shard)
    assert "holds no labels" in outcome(place)
    save_file({k: v for k, v in good.items() if k != "latents_flip"}, shard)
    found = latent_formats.load(place, ANY)
    assert not found.mirrors and found.contents.notes == [f"flipped latents are not used: {shard.name} has none"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_safetensors_of_other_floats(place: Path, dtype: torch.dtype) -> None:
    latents = torch.tensor(MEAN).to(dtype)
    save_file({"labels": torch.tensor(LABELS), "latents": latents}, place / "a.safetensors", {"made": "by a test"})
    for path in (place, place / "a.safetensors"):
        assert torch.equal(latent_formats.load(path, ANY).read(torch.arange(N)), latents.float().half())


def test_a_shard_without_labels_is_said_to_be_one(place: Path) -> None:
    save_file({"latents": torch.zeros(5, 4, 6, 6)}, place / "a.safetensors")
    with pytest.raises(DataError, match=r"a\.safetensors cannot be read \(ValueError: holds no labels\)"):
        open_dataset(str(place), "latents", ANY)


def test_statistics_of_channels_are_needed_and_checked(place: Path) -> None:
    lightningdit(place)
    stats = place / "latents_stats.pt"
    ones = torch.ones(1, 8, 1, 1)
    for change, said in (
        ({"std": 0 * ones}, "make no sense"),
        ({"std": 1e-300 * ones.double()}, "make no sense"),
        ({"std": 1e30 * ones}, "make no sense"),
        ({"mean": 1e30 * ones}, "make no sense"),
        ({"mean": ones + 1j}, "its numbers are complex"),
        ({"mean": ones * float("nan")}, "make no sense"),
        ({"mean": torch.ones(4)}, "is of 4 channels, the latents of 8"),
        ({"std": "x"}, "cannot be read"),
    ):
        torch.save({"mean": ones, "std": ones} | change, stats)
        assert said in outcome(place) and "latents_stats.pt" in outcome(place)
    stats.unlink()
    assert outcome(place) == "latents_stats.pt is missing: its mean and std scale the channels"


# .npy


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (None, ""),
        ([[name, 0] for name in edm2_names()[:-1]], f"has no label of {edm2_names()[-1]}"),
        ([[name, 0] for name in [*edm2_names(), "x.npy"]], "has a label of x.npy, which is missing"),
        ([[name, 0.5] for name in edm2_names()], "has labels that are no whole numbers"),
        ([[name, -1] for name in edm2_names()], "00000/img-mean-std-00000000.npy has label -1"),
        ([[name, 2**70] for name in edm2_names()], "has labels that are no whole numbers"),
        ([[name, 0] for name in edm2_names()] + [[edm2_names()[2], 0]], ""),
        ([[name, 0] for name in edm2_names()] + [[edm2_names()[2], 1]], "img-mean-std-00000002.npy the labels 0 and 1"),
        (5, "dataset.json cannot be read"),
    ],
)
def test_labels_of_dataset_json(place: Path, labels: Any, said: str) -> None:
    edm2(place)
    (place / "dataset.json").write_text(json.dumps({"labels": labels}))
    assert said in outcome(place) and bool(said) == bool(outcome(place))
    if labels is None:
        assert latent_formats.load(place, ANY).contents.classes == ()


def test_wrong_npy_is_named(place: Path) -> None:
    edm2(place)
    name = edm2_names()[3]
    for values, said in (
        (np.zeros((8, 6, 7), np.float32), "is 8 x 6 x 7, not 8 x 6 x 6"),
        (np.zeros((4, 6, 6), np.float32), "is 4 x 6 x 6, not 8 x 6 x 6"),
        (np.zeros((8, 36), np.float32), "no latent [C, H, W]"),
        (np.zeros((8, 6, 6), np.int32), "no latent [C, H, W]"),
        (np.array([Evil()], dtype=object), "is not object"),
    ):
        (place / name).write_bytes(npy(values))
        assert name in outcome(place) and said in outcome(place)
    header = npy(np.zeros((8, 6, 6), np.float32))
    (place / name).write_bytes(header.replace(b"(8, 6, 6)", b"(8, 9**9,)"))
    assert "has a damaged .npy header" in outcome(place)
    assert not Evil.ran


def test_a_zip_whose_checksum_is_wrong(place: Path) -> None:
    made = edm2_zip(place)
    content = bytearray(made.place.read_bytes())
    content[400] ^= 1  # in the numbers of the first member
    made.place.write_bytes(content)
    assert outcome(made.place) == (
        f"{edm2_names()[0]} cannot be read (ValueError: does not have the checksum that the zip states)"
    )


def test_a_zip_that_holds_a_name_twice(place: Path) -> None:
    made = edm2_zip(place)
    with zipfile.ZipFile(made.place, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(edm2_names()[3], npy(ROWS[0]))
    assert f"holds {edm2_names()[3]} twice" in outcome(made.place)


def test_damaged_npy_are_not_said_to_be_images(place: Path) -> None:
    made = edm2_zip(place)
    os.truncate(made.place, made.place.stat().st_size // 2)
    with pytest.raises(DataError, match=r"the zip cannot be read \(BadZipFile"):
        open_dataset(str(made.place), "latents", ANY)
    path = place / "folder" / edm2_names()[3]
    path.unlink()
    path.symlink_to(path.name)
    with pytest.raises(DataError, match=r"the folder cannot be read \(OSError.*symbolic links.*00000003\.npy"):
        open_dataset(str(place / "folder"), "latents", ANY)
    (place / "folder" / "dataset.json").unlink()
    with pytest.raises(DataError, match="holds no latents in a known format"):
        open_dataset(str(place / "folder"), "latents", ANY)


def test_latents_of_many_channels_without_std(place: Path) -> None:
    for i, name in enumerate(edm2_names()):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(npy(np.random.RandomState(i).randn(768, 4, 4).astype(np.float16)))
    (place / "dataset.json").write_text('{"labels": null}')
    assert "has a std below 0" in outcome(place, Wanted(4, 384))  # they are mean || std if that is said
    for wanted in (ANY, Wanted(4, 768)):
        found = latent_formats.load(place, wanted)
        assert found.shape == (768, 4, 4) and not found.layout.std and found.layout.scale == 1.0


# LMDB


def test_an_lmdb_that_is_cut_off_is_refused(place: Path) -> None:
    made = meanflow_lmdb(place)
    content = (made.place / "data.mdb").read_bytes()
    used = len(content.rstrip(b"\0"))
    for length in (0, 100, *range(4096, used, 4096)):
        (made.place / "data.mdb").write_bytes(content[:length])
        assert outcome(made.place).startswith("data.mdb cannot be read")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_every_version(place: Path, protocol: int) -> None:
    made = lmdb_of(place, meanflow_entries(protocol))
    assert torch.equal(latent_formats.load(made, ANY).read(torch.arange(N)), half(ROWS))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"3": None}, "entry 3 cannot be read (ValueError: has no key 3)"),
        ({"num_samples": None}, "has neither num_samples nor length"),
        ({"num_samples": b"1000"}, "says num_samples 1000 with 14 entries"),
        ({"num_samples": b"x"}, "data.mdb cannot be read"),
        ({"4": b"nonsense"}, "entry 4 cannot be read"),
        ({"4": pickle.dumps([1, 2])}, "entry 4 cannot be read (ValueError: holds no moments and label)"),
        ({"4": pickle.dumps({"moments": 1, "label": -4})}, "entry 4 has label -4, not 0 to"),
        ({"4": pickle.dumps({"moments": 1, "label": np.float32(1.5)})}, "has the label '1.5', which is no whole"),
        ({"4": pickle.dumps({"moments": 1, "label": True})}, "has the label 'True', which is no whole number"),
        ({"4": pickle.dumps({"moments": 1, "label": "1"})}, "has the label '1', which is no whole number"),
        ({"4": pickle.dumps({"moments": 1, "label": 0})}, "holds '1', which is no array of numbers"),
        ({"0": pickle.dumps({"moments": MOMENTS[0, :7], "label": 0})}, "holds 7 channels, no mean || log-variance"),
        ({"4": pickle.dumps({"moments": MOMENTS[0, :4], "label": 0})}, "entry 4 is 4 x 6 x 6, not 8 x 6 x 6"),
        ({"4": pickle.dumps({"moments": MOMENTS[0].astype(object), "label": 0})}, "entry 4 cannot be read"),
    ],
)
def test_wrong_entries_are_named(place: Path, change: dict, said: str) -> None:
    entries = {key: value for key, value in (meanflow_entries() | change).items() if value is not None}
    assert said in outcome(lmdb_of(place, entries))


def test_labels_of_numpy_are_taken(place: Path) -> None:
    entries = meanflow_entries() | {"0": pickle.dumps({"moments": MOMENTS[0], "label": np.int64(LABELS[0])})}
    found = latent_formats.load(lmdb_of(place, entries), ANY)
    assert found.labels.tolist() == LABELS
    assert not found.mirrors and found.contents.notes == ["flipped latents are not used: entry 0 has none"]


@pytest.mark.parametrize("label", [b"1_0", b" 1", b"1.0", b"", b"0" * 20 + b"1"])
def test_labels_as_text_are_whole_numbers(place: Path, label: bytes) -> None:
    entries = {"z-0": MOMENTS[0].tobytes(), "y-0": label, "length": b"1"}
    assert "entry z-0 cannot be read (ValueError: has b'" in outcome(lmdb_of(place, entries))


def test_bytes_of_another_length_are_named(place: Path) -> None:
    entries = {"z-0": MOMENTS[0].tobytes()[:-4], "y-0": b"1", "length": b"1"}
    assert "entry z-0 cannot be read (ValueError: has 1148 bytes" in outcome(lmdb_of(place, entries))


class Evil:
    """What runs where it is unpickled."""

    ran: list[int] = []  # noqa: RUF012

    def __reduce__(self) -> Any:
        return Evil.ran.append, (1,)


class Command:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_pickle_is_run(place: Path, tmp_path: Path) -> None:
    command = Command(tmp_path / "ran")
    for i, value in enumerate((command, {"moments": command, "label": 0}, {"moments": MOMENTS[0], "label": command})):
        (place / str(i)).mkdir()
        assert "entry 4 cannot be read" in outcome(
            lmdb_of(place / str(i), meanflow_entries() | {"4": pickle.dumps(value)})
        )
    for folder, write in (("pt", lambda path, value: torch.save(value, path)), ("stats", None)):
        (place / folder).mkdir()
        if write:
            pt_sample(place / folder)
            write(place / folder / "n3" / "0.pt", {"latent": command})
        else:
            lightningdit(place / folder)
            torch.save({"mean": command, "std": 1}, place / folder / "latents_stats.pt")
        assert "cannot be read" in outcome(place / folder)
    (place / "npz").mkdir()
    mar_npz(place / "npz")
    np.savez(place / "npz" / "n3" / "0.JPEG.npz", moments=np.array([command], dtype=object))
    assert "0.JPEG.npz" in outcome(place / "npz")
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(command))
    assert (tmp_path / "ran").exists()  # as it would have been


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_are_described_as_they_are(protocol: int) -> None:
    values = {
        "numbers": [0, 255, 65535, -1, 2**31, 2**70, -(2**70), 0.5, None, True, False],
        "texts": ["é", "x" * 300, b"y" * 300, b""],
        "tuples": ((), (1,), (1, 2), (1, 2, 3), tuple(range(9))),
        "deep": {"a": [{"b": []}]},
        "same": [["x"]] * 3,
    }
    found = pickled.described(pickle.dumps(values, protocol=protocol))
    found["texts"][2:] = map(bytes, found["texts"][2:])
    assert found == values
    for array in (MOMENTS, MOMENTS[0].T, np.float32(3), np.int64(-3), np.zeros((0, 3)), np.arange(4, dtype=">i2")):
        again = pickled.array(pickled.described(pickle.dumps(array, protocol=protocol)))
        assert again.dtype == array.dtype and np.array_equal(again, array)


def test_damaged_pickles_are_refused_and_nothing_else() -> None:
    content = pickle.dumps({"moments": MOMENTS[0, 0, :2, :2], "label": 3, "filename": "a"})
    for at in range(len(content)):
        for damaged in (content[:at], content[:at] + bytes([content[at] ^ 0x21]) + content[at + 1 :]):
            try:
                found = pickled.described(damaged)
                pickled.array(found["moments"]) if isinstance(found, dict) and "moments" in found else None
            except ValueError:
                pass
    with pytest.raises(ValueError, match="too many parts"):
        pickled.described(b"N" * 20_000)


# Files each


def test_moments_that_are_samples_are_told_by_the_channels(place: Path) -> None:
    each(place, ".pt", lambda path, i: torch.save({"moments": MEAN[i], "moments_flip": TWIN[i]}, path))
    found = latent_formats.load(place, Wanted(6, 4))
    assert not found.layout.std and found.layout.scale == 1.0 and found.mirrors
    assert torch.equal(found.read(torch.arange(N)), half(MEAN[ORDER]))


def test_a_log_variance_is_taken_as_one(place: Path) -> None:
    def write(path: Path, i: int) -> None:
        torch.save({"mean": torch.tensor(MEAN[i]), "logvar": torch.tensor(LOGVAR[i])}, path)

    each(place, ".pt", write)
    found = latent_formats.load(place, Wanted(6, 4))
    assert found.layout.std and found.layout.scale == 0.18215
    assert torch.equal(found.read(torch.arange(N)), half(ROWS[ORDER]))


@pytest.mark.parametrize("twin", [True, False])
def test_twins_have_a_std_of_their_own(place: Path, twin: bool) -> None:
    def write(path: Path, i: int) -> None:
        own = {"std_flip": torch.tensor(STD[i] + 1)} if twin else {}
        parts = {"latent": MEAN[i], "std": STD[i], "latent_flip": TWIN[i]}
        torch.save({name: torch.tensor(part) for name, part in parts.items()} | own, path)

    each(place, ".pt", write)
    found = latent_formats.load(place, ANY)
    assert found.mirrors == twin
    assert ("flipped latents are not used: n0/1.pt has no std_flip" in found.contents.notes) == (not twin)
    if twin:
        rows = half(np.concatenate([TWIN, STD + 1], 1)[ORDER])
        assert torch.equal(found.read(torch.arange(N), torch.ones(N, dtype=torch.bool)), rows)


def test_what_some_files_hold_and_others_lack_is_named(place: Path) -> None:
    whole = {"latent": torch.tensor(MEAN[0]), "latent_flip": torch.tensor(TWIN[0]), "label": 1}
    for name in ("label", "latent_flip"):
        less = {key: value for key, value in whole.items() if key != name}
        for first, other, said in ((whole, less, f"no {name}, 0.pt one"), (less, whole, f"a {name}, 0.pt none")):
            for i in range(3):
                torch.save(other if i == 1 else first, place / f"{i}.pt")
            with pytest.raises(DataError, match=rf"1\.pt cannot be read \(ValueError: holds {said}\)"):
                latent_formats.load(place, ANY)


def test_a_folder_whose_only_file_is_no_file(place: Path) -> None:
    (place / "a.pt").symlink_to("nothing")
    assert outcome(place) == "holds no file of latents"


def test_what_is_not_run_is_named_without_torchs_advice(place: Path, tmp_path: Path) -> None:
    pt_sample(place)
    torch.save({"latent": Command(tmp_path / "ran")}, place / "n0" / "1.pt")
    said = "n0/1.pt cannot be read (ValueError: calls posix.mkdir, which is not run)"
    assert outcome(place) == said and not (tmp_path / "ran").exists()


def test_wrong_files_are_named(place: Path) -> None:
    pt_sample(place)
    path = place / "n0" / "7.pt"
    for value, said in (
        ({"latent": torch.zeros(4, 6, 7)}, "is 4 x 6 x 7, not 4 x 6 x 6"),
        ({"x": torch.zeros(4, 6, 6)}, "cannot be read (ValueError: holds no latent, n0/1.pt one)"),
        ({"latent": "text"}, "holds str in place of numbers"),
        ({"latent": torch.zeros(4, 6, 6, dtype=torch.complex64)}, "holds torch.complex64 in place of numbers"),
        ({"latent": torch.zeros(4, 6, 6).int()}, "holds torch.int32 in place of numbers"),
        (torch.zeros(6), "no latent [C, H, W]"),
        ([1], "'latent'"),
        ({"latent": torch.full((4, 6, 6), float("inf"))}, "is not finite in float16"),
    ):
        torch.save(value, path)
        assert "n0/7.pt" in outcome(place) and (said in outcome(place) or isinstance(value, list))
    torch.save({"x": 1}, place / "n0" / "1.pt")
    assert outcome(place) == "n0/1.pt holds none of moments, latent, latents, mean"


@pytest.mark.parametrize(
    "label", ["x", "1", -1, 1.5, torch.tensor(1.5), True, torch.tensor(True), torch.zeros(2).int(), 2**70, None]
)
def test_wrong_labels_of_files_are_refused(place: Path, label: Any) -> None:
    pt_with_labels(place)
    torch.save({"latent": torch.tensor(MEAN[3]), "label": label}, place / "3.pt")
    assert "3.pt" in outcome(place) or "labels" in outcome(place)


# fast-DiT


def test_wrong_fast_dit_is_named(place: Path) -> None:
    fast_dit(place)
    for name, values, said in (
        ("imagenet256_labels/5.npy", np.array([1, 2]), "no label"),
        ("imagenet256_labels/5.npy", np.array([0.5]), "no label"),
        ("imagenet256_labels/5.npy", np.array([-7]), "imagenet256_features/5.npy has label -7, not 0 to"),
        ("imagenet256_features/5.npy", np.zeros((2, 4, 6, 6), np.float32), "no latent [C, H, W]"),
        ("imagenet256_features/5.npy", np.zeros((1, 4, 6, 5), np.float32), "is 4 x 6 x 5, not 4 x 6 x 6"),
    ):
        kept = (place / name).read_bytes()
        (place / name).write_bytes(npy(values))
        assert said in outcome(place) and "5.npy" in outcome(place)
        (place / name).write_bytes(kept)
    (place / "imagenet256_labels" / "5.npy").unlink()
    assert "imagenet256_labels/5.npy cannot be read" in outcome(place)
