"""Tar shards: which samples are found in them, how they are read, and what is refused."""

import gzip
import io
import json
import multiprocessing
import os
import pickle
import tarfile
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from soflow_fast.data import webdataset
from soflow_fast.data.dataset import Dataset, Wanted
from soflow_fast.data.webdataset import Names, TarFiles
from soflow_fast.errors import DataError

WANTED = Wanted(size=4, channels=3)


def picture(value: int, kind: str = "PNG") -> bytes:
    """An image file of 4 x 4 whose left half is one gray and whose right half is black."""
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[:, :2] = value
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


Members = dict[str, bytes] | list[tuple[str, bytes]]


def shard(path: Path, members: Members, form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def values(data: Dataset, **more: Any) -> list[int]:
    """The gray of each sample's first pixel."""
    return data.read(torch.arange(len(data)), **more)[:, 0, 0, 0].tolist()


def message(place: Path) -> str:
    with pytest.raises(DataError) as error:
        webdataset.load(place, WANTED)
    line = str(error.value)
    assert line.startswith(f"--data {place}: ") and line.isprintable(), line
    return line


GOOD = {"a.png": picture(10), "a.cls": b"0"}
TEN = {f"shard-{i}.tar": {f"{i:03}.png": picture(20 * i + 10), f"{i:03}.cls": b"%d" % (i % 3)} for i in range(12)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "set"
    place.mkdir()
    for name, members in TEN.items():
        shard(place / name, members)
    return place


def test_shards_are_read_in_the_order_of_their_numbers(folder: Path) -> None:
    (folder / ".hidden.tar").write_bytes(b"x")
    (folder / "list.txt").write_bytes(b"x")
    assert webdataset.recognises(folder)
    data = webdataset.load(folder, WANTED)
    assert values(data) == [20 * i + 10 for i in range(12)]
    assert data.labels.tolist() == [i % 3 for i in range(12)] and data.labels.dtype == torch.int64
    assert data.contents.classes == ("0", "1", "2") and data.contents.kind == "WebDataset in 12 tar shards"
    one = webdataset.load(folder / "shard-9.tar", WANTED)
    assert values(one) == [190] and one.labels.tolist() == [0] and one.contents.kind == "WebDataset in 1 tar shard"
    assert values(one, mirrored=torch.tensor([True])) == [0]


def test_members_of_one_name_are_a_sample(tmp_path: Path) -> None:
    members = {
        "./a/1.cls": b" 3\n",
        "./a/1.JPEG": picture(10, "JPEG"),
        "b/1.png": picture(20),
        "b/1.json": json.dumps({"label": 1, "caption": "x"}).encode(),
        "b/1.seg.png": picture(99),
        "b/1.txt": b"text",
        "b/2.json": b'{"class": 0}',
        "c.webp": picture(40, "WEBP"),
        "c.d.e.cls": b"9",
        "b/2.png": picture(30, "JPEG"),
        "c.json": b'{"cls": 2, "label": null}',
        "d.json": b'{"label": 1}',
        "b/._1.png": b"x",
        ".hidden": b"x",
        "readme": b"x",
    }
    data = webdataset.load(shard(tmp_path / "x.tar", members), WANTED)
    assert [round(value, -1) for value in values(data)] == [10, 20, 30, 40]
    assert data.labels.tolist() == [3, 1, 0, 2] and len(data.contents.classes) == 4
    left_out = {"hidden": 2, ".png": 1, ".txt": 1, ".cls": 1, "no suffix": 1, "without an image": 1}
    assert data.contents.left_out == left_out


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_names_in_other_letters(form: int, tmp_path: Path) -> None:
    folder = "/".join(["f" * 40] * 3)
    members = {f"{folder}/é.png": picture(10), f"{folder}/é.cls": b"0", f"{folder}/b.png": picture(20)}
    members[f"{folder}/b.cls"] = b"1"
    data = webdataset.load(shard(tmp_path / "x.tar", members, form), WANTED)
    assert values(data) == [10, 20] and data.labels.tolist() == [0, 1]


def test_without_labels_there_are_no_classes(tmp_path: Path) -> None:
    data = webdataset.load(shard(tmp_path / "x.tar", {"a.png": picture(10), "b.png": picture(20)}), WANTED)
    assert data.contents.classes == () and data.labels.tolist() == [0, 0]
    assert data.contents.notes == ["no sample has a label"]
    place = shard(tmp_path / "y.tar", {"a.png": picture(10), "a.cls": b"0", "b.png": picture(20)})
    assert "y.tar/b.png has no label, others have one" in message(place)


def test_numbers_of_classes_have_no_gaps(tmp_path: Path) -> None:
    place = shard(tmp_path / "x.tar", {"a.png": picture(10), "a.cls": b"0", "b.png": picture(20), "b.cls": b"3"})
    assert message(place).endswith(": 1 is a class without an image (2 of 4 classes are)")


def test_a_checksum_is_of_names_sizes_and_labels(folder: Path, tmp_path: Path) -> None:
    first = webdataset.load(folder, WANTED).contents.checksum
    folder.rename(tmp_path / "elsewhere")
    assert webdataset.load(tmp_path / "elsewhere", WANTED).contents.checksum == first
    shard(tmp_path / "elsewhere" / "shard-3.tar", {"003.png": picture(70), "003.cls": b"1"})
    assert webdataset.load(tmp_path / "elsewhere", WANTED).contents.checksum != first


def states_of(shards: list[Path]) -> list[tuple[int, int]]:
    return [((status := path.stat()).st_size, status.st_mtime_ns) for path in shards]


@pytest.fixture
def files(folder: Path) -> TarFiles:
    """The images of the shards, by a place that is looked up here."""
    shards = sorted(folder.iterdir(), key=lambda path: int(path.stem.split("-")[1]))
    infos = []
    for path in shards:
        with tarfile.open(path) as archive:
            infos.append(next(info for info in archive if info.name.endswith(".png")))
    offsets, sizes = (np.array([getattr(info, name) for info in infos]) for name in ("offset_data", "size"))
    texts = [info.name.encode() for info in infos]
    names = Names(b"".join(texts), np.cumsum([len(text) for text in texts]))
    return TarFiles(shards, states_of(shards), np.arange(12), offsets, sizes, names)


def _read(given: tuple[TarFiles, int]) -> bytes:
    return given[0].read(given[1])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_files_are_read_in_forked_processes_threads_and_others(
    files: TarFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [TEN[f"shard-{i}.tar"][f"{i:03}.png"] for i in range(12)]
    assert list(files.names) == [f"{i:03}.png" for i in range(12)] and files.names[-1] == "011.png"
    assert files.names[2:4] == ["002.png", "003.png"]
    with pytest.raises(IndexError):
        files.names[12]
    assert files.read(5) == expected[5]
    again = pickle.loads(pickle.dumps(files))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(again.read, [*range(12)] * 20)) == expected * 20
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # with a shard that is open and with others that are not
        right = all(files.read(i) == expected[i] for i in range(12))
        os.write(writer, b"right" if right else b"wrong")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 5) == b"right"
    os.close(reader)
    os.close(writer)
    monkeypatch.setattr(webdataset, "HANDLES", 3)
    few = TarFiles(files.shards, files.states, files.shard, files.offsets, files.sizes, files.names)
    assert [few.read(i) for i in range(12)] == expected
    kept = list(few._opened.values())
    assert len(kept) == 3 and all(os.fstat(handle) for handle in kept)
    del few
    for handle in kept:
        with pytest.raises(OSError):
            os.fstat(handle)


def test_files_are_read_in_a_spawned_process(files: TarFiles) -> None:
    files.read(0)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(_read, [(files, 0), (files, 7)]) == [files.read(0), files.read(7)]


def test_a_shard_that_is_cut_off_or_gone_later_is_named(files: TarFiles) -> None:
    os.truncate(files.shards[3], 520)
    with pytest.raises(OSError, match=r"the shard has changed since it was opened"):
        files.read(3)
    files.states[3] = states_of(files.shards)[3]
    with pytest.raises(OSError, match=r"the shard is cut off"):
        files.read(3)
    files.shards[4].unlink()
    with pytest.raises(OSError, match=r"shard-4\.tar"):
        files.read(4)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_shard_with_other_pixels_later_is_named(replaced: bool, folder: Path) -> None:
    """Written over in its place, or another file of the same length in its place, while its handle is open."""
    data = webdataset.load(folder, WANTED)
    values(data)
    one = folder / "shard-1.tar"
    content = one.read_bytes().replace(picture(30), picture(31))
    assert len(content) == one.stat().st_size and content != one.read_bytes()
    time = one.stat().st_mtime_ns + 10**9
    aside = folder / "aside" if replaced else one
    aside.write_bytes(content)
    os.utime(aside, ns=(time, time))
    os.replace(aside, one)
    said = f"^--data {folder}: shard-1.tar/001.png cannot be read: the shard has changed since it was opened$"
    with pytest.raises(DataError, match=said):
        values(data)


def test_what_lies_beside_shards_is_counted(folder: Path) -> None:
    for name in ("a.png", "b.PNG", "notes.md", ".DS_Store", "README", "Thumbs.db"):
        (folder / name).write_bytes(picture(1))
    (folder / "@eaDir").mkdir()
    assert webdataset.recognises(folder)
    left_out = webdataset.load(folder, WANTED).contents.left_out
    assert left_out == {".png": 2, ".md": 1, "hidden": 3, "no ending": 1}


def test_members_are_images_by_the_rules_of_folders(tmp_path: Path) -> None:
    """The same endings, and what a computer made for itself is nobody's."""
    kinds = {"jfif": "JPEG", "jpe": "JPEG", "tif": "TIFF", "tiff": "TIFF", "bmp": "BMP", "gif": "GIF", "png": "JPEG"}
    members = {f"{i}.{ending}": picture(100, kind) for i, (ending, kind) in enumerate(kinds.items())}
    members |= {"@eaDir/0.jpg": picture(9), "__MACOSX/a/1.png": picture(9), "a/.b/2.png": picture(9)}
    data = webdataset.load(shard(tmp_path / "x.tar", members), WANTED)
    assert [round(value, -1) for value in values(data)] == [100] * 7 and data.contents.left_out == {"hidden": 3}


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ("train-000.tar", "val-000.tar", "holds train-000.tar and val-000.tar side by side"),
        ("x-train-0.tar", "x-validation-0.tar", "holds x-train-0.tar and x-validation-0.tar side by side"),
        ("train/0.tar", "val/0.tar", "holds shards in train and val: name one of them, --data {place}/train"),
        ("w/train/0.tar", "w/test/0.tar", "in w/test and w/train: name one of them, --data {place}/w/test"),
        ("00000/0.tar", "00001/0.tar", "holds shards in 00000 and 00001: name one of them"),
    ],
)
def test_splits_of_shards_are_not_put_together(first: str, second: str, said: str, tmp_path: Path) -> None:
    place = tmp_path / "set"
    for name in (first, second):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shard(place / name, GOOD)
    assert webdataset.recognises(place) and said.format(place=place) in message(place)


def test_a_folder_around_shards_is_looked_through(folder: Path, tmp_path: Path) -> None:
    expected = webdataset.load(folder, WANTED).contents
    (tmp_path / "outer" / "__MACOSX").mkdir(parents=True)
    folder.rename(tmp_path / "outer" / "inner")
    assert webdataset.recognises(tmp_path / "outer")
    assert webdataset.load(tmp_path / "outer", WANTED).contents == expected


def test_classes_with_an_archive_in_them_are_no_shards(tmp_path: Path) -> None:
    (tmp_path / "set" / "cat").mkdir(parents=True)
    shard(tmp_path / "set" / "cat" / "backup.tar", GOOD)
    (tmp_path / "set" / "cat" / "1.png").write_bytes(picture(1))
    assert not webdataset.recognises(tmp_path / "set")


def special(name: str, kind: bytes, target: str = "") -> Callable[[tarfile.TarFile], None]:
    def add(archive: tarfile.TarFile) -> None:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        archive.addfile(info)

    return add


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("b.png", tarfile.SYMTYPE, "b.png is a link"),
        ("b.png", tarfile.LNKTYPE, "b.png is a link"),
        ("b.png", tarfile.FIFOTYPE, "b.png is no plain file"),
        ("b.png", tarfile.CHRTYPE, "b.png is no plain file"),
        ("b.png", tarfile.GNUTYPE_SPARSE, "b.png is no plain file"),
        ("/etc/b.png", tarfile.REGTYPE, "'/etc/b.png' points out of the shard"),
        ("../b.png", tarfile.REGTYPE, "'../b.png' points out of the shard"),
        ("a/../b.png", tarfile.REGTYPE, "'a/../b.png' points out of the shard"),
        ("a\\b.png", tarfile.REGTYPE, "points out of the shard"),
        ("a/../b", tarfile.DIRTYPE, "points out of the shard"),
    ],
)
def test_members_that_are_no_files_or_lie_elsewhere(name: str, kind: bytes, said: str, tmp_path: Path) -> None:
    place = shard(tmp_path / "x.tar", GOOD)
    with tarfile.open(place, "a") as archive:
        special(name, kind, "/etc/passwd")(archive)
    assert said in message(place)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("a.png", picture(1)), ("a.png", picture(2))], "a has two images, a.png and a.png"),
        ([("a.png", picture(1)), ("a.jpg", picture(2))], "a has two images, a.png and a.jpg"),
        ([("a.cls", b"1"), ("a.png", picture(1)), ("a.cls", b"1")], "a.cls is in it twice"),
        ([("a.json", b'{"cls": 1}'), ("a.png", b""), ("a.json", b'{"cls": 1}')], "a.json is in it twice"),
        ([("a.cls", b"cat")], "a.cls holds no class as a number"),
        ([("a.cls", b"-1")], "a.cls holds no class as a number"),
        ([("a.cls", b"1" * 40)], "a.cls holds no class as a number"),
        ([("a.cls", "٣".encode())], "a.cls holds no class as a number"),
        ([("a.cls", b"100000")], "a.cls holds a label that is not in 0..99999"),
        ([("a.json", b'{"label": "cat"}')], "a.json holds a label that is no integer"),
        ([("a.json", b'{"label": true}')], "a.json holds a label that is no integer"),
        ([("a.json", b'{"label": -1}')], "a.json holds a label that is not in 0..99999"),
        ([("a.json", b"{")], "a.json is no JSON"),
        ([("a.json", b"[" * 100000)], "a.json is no JSON"),
        ([("a.json", b"\xff\xfe")], "a.json is no JSON"),
        ([("a.json", bytes(2**20 + 1))], "a.json has 1048577 bytes"),
        ([("a.txt", b"text")], "holds no images (.apng"),
        ([("n01440764.tar", b"text")], "holds no images (.apng"),
        ([("a\n.png", picture(1)), ("a\n.png", picture(1))], "a\\n has two images"),
    ],
)
def test_members_that_are_no_samples(members: Members, said: str, tmp_path: Path) -> None:
    place = tmp_path / "set"
    place.mkdir()
    shard(place / "x.tar", members)
    line = message(place)
    assert said in line and ("x.tar: " in line or "holds no images" in line)


def test_a_member_that_is_too_large_is_named(tmp_path: Path) -> None:
    place = tmp_path / "x.tar"
    info = tarfile.TarInfo("b.png")
    info.size = webdataset.LARGEST_MEMBER + 1
    with place.open("wb") as file:
        file.write(info.tobuf())
        file.truncate(2**27)
    assert "b.png has 64 MiB, more than an image has" in message(place)


def test_headers_that_claim_to_be_long_or_below_zero_do_not_fill_the_memory(tmp_path: Path) -> None:
    place = tmp_path / "x.tar"
    tracemalloc.start()
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.REGTYPE):
        for size in (2**33, -1, -1024, -(2**40)):
            info = tarfile.TarInfo("b.png")
            info.size, info.type = size, kind
            with place.open("wb") as file:
                file.write(info.tobuf(tarfile.GNU_FORMAT))
                file.truncate(2**34)
            message(place)
    longname = tarfile.TarInfo("b.png")
    longname.size, longname.type = 512, tarfile.GNUTYPE_LONGNAME
    place.write_bytes((longname.tobuf() + b"n" * 512) * 2000)
    assert "damaged" in message(place)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * 2**20


def test_whatever_is_damaged_ends_in_one_line_or_in_the_samples(tmp_path: Path) -> None:
    """Cut off at every length the whole shard is refused, but in the zeros that follow its end."""
    members = {"a.png": picture(10), "a.cls": b"1", "b.png": picture(20), "b.json": b'{"label": 0}'}
    place = shard(tmp_path / "x.tar", members)
    content = place.read_bytes()
    end = 8 * 512
    assert not any(content[end:]) and any(content[end - 512 : end])
    for length in range(0, end + 512, 3):
        place.write_bytes(content[:length])
        message(place)
    for length in (end + 512, end + 1000, len(content)):
        place.write_bytes(content[:length])
        assert values(webdataset.load(place, WANTED)) == [10, 20]
    refused = 0
    for position in range(0, end + 1024):
        bad = bytearray(content)
        bad[position] ^= 0x55
        place.write_bytes(bad)
        try:
            values(webdataset.load(place, WANTED))
        except DataError as error:
            assert str(error).startswith(f"--data {place}: ") and str(error).isprintable(), error
            refused += 1
    assert refused > 4 * 512 + 512, "each byte of four headers, and of the end"
    place.write_bytes(content + content)
    assert f"goes on after its end at byte {end}" in message(place)


def test_what_is_no_tar_is_not_taken_for_one(folder: Path, tmp_path: Path) -> None:
    packed = tmp_path / "x.tar.gz"
    packed.write_bytes(gzip.compress((folder / "shard-1.tar").read_bytes()))
    assert webdataset.recognises(packed) and "is compressed: gunzip it first" in message(packed)
    (tmp_path / "text.tar").write_bytes(b"text" * 1000)
    (tmp_path / "zeros.tar").write_bytes(bytes(10240))
    (tmp_path / "cut.tar").write_bytes((folder / "shard-1.tar").read_bytes()[:400])
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.tar")
    for name in ("text.tar", "zeros.tar", "cut.tar", "empty", "pipe.tar", "nowhere"):
        assert not webdataset.recognises(tmp_path / name), name
        message(tmp_path / name)
    (folder / "cat").mkdir()
    assert not webdataset.recognises(folder), "a folder of images with a tar in it"


def test_how_far_it_is_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(webdataset, "TELL_EVERY", 5)
    webdataset.load(folder, WANTED._replace(say=told.append))
    assert told == ["5 samples in 5 of 12 shards", "10 samples in 10 of 12 shards"]
