"""Zips of images: memory, damage, and the kinds of zips."""

import io
import json
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
from pictures import WANTED, archive, folder, picture, refusal, values

from soflow_fast.data import images
from soflow_fast.data.images import load, recognises
from soflow_fast.data.images.listing import Names
from soflow_fast.data.images.zip_directory import members
from soflow_fast.errors import DataError


def test_names_take_their_bytes_only() -> None:
    given = [f"class{i % 1000}/image_{i}.png" for i in range(20_000)] + ["", "ä", "\udcff", "\ud800"]
    tracemalloc.start()
    names = Names(iter(given))
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert list(names) == given and names[20_001] == "ä" and names[1:3] == given[1:3]
    assert kept < sum(map(len, given)) + 9 * len(given) + 10_000


def test_a_zip_takes_no_more_than_an_index(tmp_path: Path) -> None:
    """Less than 100 bytes and the name, for each member."""
    content, count = picture(1), 20_000
    place = archive(tmp_path / "set", {f"{i % 10}/{i}.png": content for i in range(count)})
    tracemalloc.start()
    found = images.Zip(place)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found.names) == count and kept < count * 120


class Pipe(io.RawIOBase):
    """A file of which no place can be found again."""

    def __init__(self, file: Any) -> None:
        self.write = file.write

    def writable(self) -> bool:
        return True


def test_a_zip_behind_other_bytes_and_one_in_64_bits(tmp_path: Path) -> None:
    """As a program that unpacks itself has, and as one that is written to a pipe."""
    place = archive(tmp_path / "set", {f"a/{i}.png": picture(i) for i in range(5)})
    place.write_bytes(b"#!/bin/sh\n" * 1000 + place.read_bytes())
    assert values(load(place, WANTED)) == list(range(5)) and recognises(place)
    with zipfile.ZipFile(place, "w") as file:
        for i in range(5):
            with file.open(f"a/{i}.png", "w", force_zip64=True) as member:
                member.write(picture(i))
    assert values(load(place, WANTED)) == list(range(5))
    with place.open("wb") as file, zipfile.ZipFile(Pipe(file), "w", zipfile.ZIP_DEFLATED) as written:
        for i in range(5):
            written.writestr(f"a/{i}.png", picture(i))
    assert values(load(place, WANTED)) == list(range(5))


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_member_of_another_method_is_bad(tmp_path: Path, method: int) -> None:
    place = archive(tmp_path / "set", {"a/x.png": picture(1)})
    with zipfile.ZipFile(place, "a", method) as file:
        file.writestr("a/y.png", picture(2))
    assert refusal(place) == "a/y.png is compressed by another method than deflate"
    assert values(load(place, WANTED._replace(skip_bad=True))) == [1]


def test_damage_of_a_zips_member(tmp_path: Path) -> None:
    """In its content and in its header, kept as it is and deflated."""
    content = {f"a/{name}.png": picture(1) for name in "uvwx"}
    place = archive(tmp_path / "set", content)
    whole = place.read_bytes()
    for i, name in enumerate(content):
        with zipfile.ZipFile(place) as file:
            info = file.getinfo(name)
        for at in (info.header_offset, info.header_offset + 31, info.header_offset + 30 + len(name) + 20):
            changed = bytearray(whole)
            changed[at] ^= 1
            place.write_bytes(changed)
            assert refusal(place).startswith(f"{name} is no readable image ("), (i, at)
            assert len(load(place, WANTED._replace(skip_bad=True))) == 3
        place.write_bytes(whole)


def without_flag(place: Path, names: dict[bytes, str], **others: str) -> Path:
    """A zip whose names lack the flag of UTF-8, as Info-ZIP, macOS and others write it: bytes, and what they mean.

    The meaning, if there is one, is in Info-ZIP's extra."""
    with zipfile.ZipFile(place, "w") as file:
        for i, (name, meant) in enumerate(names.items()):
            info = zipfile.ZipInfo(str(i) * len(name))
            field = b"\1" + struct.pack("<L", zlib.crc32(name)) + meant.encode()
            info.extra = b"yy\1\0x" + (struct.pack("<HH", 0x7075, len(field)) + field if meant else b"")
            file.writestr(info, picture(i))
        for other, text in others.items():
            file.writestr(other, text)
    content = place.read_bytes()
    for i, name in enumerate(names):
        content = content.replace(str(i).encode() * len(name), name)
    place.write_bytes(content)
    return place


LETTERS = ["z/ascii.png", "ü/a.png", "ü/é.png", "日本/x.png"]


@pytest.mark.parametrize("raw", ["UTF-8", "UTF-8 and the extra", "escaped"])
def test_names_without_the_flag_of_utf8(tmp_path: Path, raw: str) -> None:
    """They are those of the folder, in its order."""
    written = [name.encode("ascii", "backslashreplace") if raw == "escaped" else name.encode() for name in LETTERS]
    meant = [""] * 4 if raw == "UTF-8" else LETTERS
    found = load(without_flag(tmp_path / "set.zip", dict(zip(written, meant, strict=True))), WANTED)
    expected = load(folder(tmp_path / "set", {name: picture(i) for i, name in enumerate(LETTERS)}), WANTED)
    assert found.contents.classes == expected.contents.classes == ("z", "ü", "日本")
    assert values(found) == values(expected) and found.contents.checksum == expected.contents.checksum


def test_a_name_of_dos_and_an_extra_of_another_name(tmp_path: Path) -> None:
    names = {"é/longname.png".encode("cp437"): ""}
    place = without_flag(tmp_path / "set.zip", names)
    assert load(place, WANTED).contents.classes == ("é",)
    content = without_flag(place, {b"a/longname.png": "b/x.png"}).read_bytes()
    place.write_bytes(content.replace(struct.pack("<L", zlib.crc32(b"a/longname.png")), bytes(4)))
    assert load(place, WANTED).contents.classes == ("a",)


def test_an_image_with_another_letter_finds_its_label(tmp_path: Path) -> None:
    labels = json.dumps({"labels": [["é.png", 1], ["b.png", 0]]}, ensure_ascii=False)
    place = without_flag(tmp_path / "set.zip", {"é.png".encode(): "", b"b.png": ""}, **{"dataset.json": labels})
    assert load(place, WANTED).labels.tolist() == [0, 1]


def of_64_bits(file: zipfile.ZipFile) -> None:
    with file.open("a/x.png", "w", force_zip64=True) as member:
        member.write(picture())


def with_a_comment(file: zipfile.ZipFile) -> None:
    file.writestr("a/x.png", picture())
    file.comment = b"PK\1\2 and so on" * 1000


def of_many_members(file: zipfile.ZipFile) -> None:
    for i in range(2**16 + 5):  # more than 16 bits count
        file.writestr(zipfile.ZipInfo(f"{i}.txt"), b"")


def of_names_and_remarks(file: zipfile.ZipFile) -> None:
    for i in range(300):
        info = zipfile.ZipInfo(f"a/{'ä' * (i % 2)}{'x' * 200}{i}.png")
        info.comment, info.extra = b"c" * 60_000, struct.pack("<HH", 99, i) + bytes(i)
        file.writestr(info, picture(i % 200))


def after_three_gigabytes(file: zipfile.ZipFile) -> None:
    """And five, so that offsets have 32 bits and more; the file is sparse."""
    for i in range(3):
        file.writestr(f"a/{i}.png", picture(i))
        assert file.fp
        file.start_dir += 3 * 2**30  # type: ignore[attr-defined]
        file.fp.seek(file.start_dir)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "fill",
    [of_64_bits, with_a_comment, of_many_members, of_names_and_remarks, after_three_gigabytes, lambda file: None],
)
def test_the_directory_is_read_as_zipfile_reads_it(tmp_path: Path, fill: Any) -> None:
    for before in (b"", b"#!/bin/sh\n" * 100):
        place = tmp_path / f"{len(before)}.zip"
        place.write_bytes(before)
        with zipfile.ZipFile(place, "a") as file:
            fill(file)
        with zipfile.ZipFile(place) as file, place.open("rb") as opened:
            expected = [(i.filename, i.header_offset, i.compress_size, i.file_size, i.CRC) for i in file.infolist()]
            found = list(members(opened.fileno(), place.stat().st_size))
            assert [(name, m.offset, m.packed, m.size, m.crc) for name, m in found] == expected
        if expected and expected[0][0].endswith(".png"):
            assert len(load(place, WANTED)) == len(expected)


def test_every_damaged_byte_of_a_directory_is_refused_or_harmless(tmp_path: Path) -> None:
    place = archive(tmp_path / "set", {f"a/{i}.png": picture(i) for i in range(3)})
    whole = place.read_bytes()
    for at in range(whole.index(b"PK\1\2"), len(whole)):
        for change in (0x01, 0x80, 0xFF):
            place.write_bytes(whole[:at] + bytes([whole[at] ^ change]) + whole[at + 1 :])
            try:
                assert set(values(load(place, WANTED))) <= {0, 1, 2}
            except DataError as error:
                assert str(error).startswith(f"--data {place}: ") and "\n" not in str(error)
        place.write_bytes(whole[:at])
        assert "cannot be read (BadZipFile" in refusal(place) or "cannot be read (it" in refusal(place)
