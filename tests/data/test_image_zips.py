"""Zips of images: memory, damage, and the kinds of zips."""

import io
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
from pictures import WANTED, archive, picture, refusal, values

from soflow_fast.data import images
from soflow_fast.data.images import load, recognises
from soflow_fast.data.images.listing import Names


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
