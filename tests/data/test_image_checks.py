"""Sets of images before and during a run: the check of all images, damage, files that change, processes."""

import logging
import multiprocessing
import os
import random
import struct
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import WANTED, folder, picture, refusal, values
from PIL import Image

from soflow_fast.data import images
from soflow_fast.data.dataset import Dataset
from soflow_fast.data.images import check, load
from soflow_fast.errors import DataError


@pytest.mark.parametrize("count", [2, 300])
def test_a_file_that_changes_is_named(made: Any, count: int) -> None:
    files = {f"a/{i:03}.png": picture(i % 200) for i in range(count)}
    place = made(files)
    found = load(place, WANTED)
    changed = place if place.suffix else place / "a/001.png"
    status = changed.stat()
    os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    reason = "cannot be read: the zip has changed" if place.suffix else "has changed since the data set was opened"
    with pytest.raises(DataError, match=rf"^--data {place}: a/001.png {reason}"):
        found.read(torch.tensor([1]))
    os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert found.read(torch.tensor([1])).unique().tolist() == [1]
    with changed.open("ab") as file:
        file.write(b"x")
    os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(DataError, match=rf"^--data {place}: a/001.png {reason}"):
        found.read(torch.tensor([1]))
    changed.unlink()
    with pytest.raises(DataError, match=rf"^--data {place}: a/001.png cannot be read \(No such file or directory\)"):
        found.read(torch.tensor([1]))


def read_elsewhere(found: Dataset, answers: Any) -> None:
    answers.put(values(found))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_processes_read_the_same(made: Any) -> None:
    found = load(made({f"a/{i:03}.png": picture(i) for i in range(64)}), WANTED)
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    workers = [context.Process(target=read_elsewhere, args=(found, answers)) for _ in range(3)]
    for worker in workers:
        worker.start()
    assert values(found) == list(range(64))
    assert [answers.get() for _ in workers] == [list(range(64))] * 3
    for worker in workers:
        worker.join()


INFINITE = b'{"bad": {}, "transparent": 1e999, "animated": 0}'


def test_a_second_start_is_quick(made: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that leaves out bad images; and whatever lies in the cache folder, the outcome is right."""
    files = {f"a/{i:03}.png": picture(i % 200, mode="RGBA" if i < 3 else "RGB") for i in range(300)}
    place = made({**files, "a/200.png": b"junk"})
    skipping = WANTED._replace(skip_bad=True)
    said = refusal(place)
    (kept,) = cache.iterdir()
    examined = check.examine
    monkeypatch.setattr(check, "examine", lambda content: pytest.fail("was examined"))
    assert refusal(place) == said
    found = load(place, skipping)
    assert len(found) == 299 and any("3 transparent" in note for note in found.contents.notes)
    monkeypatch.setattr(check, "examine", examined)
    for junk in (
        b"",
        b"[]",
        b"{}",
        b"\xff",
        b"[" * 10_000,
        b'{"bad": 3}',
        b'{"bad": {"x": "y"}, "transparent": 0}',
        INFINITE,
    ):
        kept.write_bytes(junk)
        assert load(place, skipping).contents == found.contents
    kept.unlink()
    os.mkfifo(kept)  # is not waited for
    assert load(place, skipping).contents == found.contents
    if not place.suffix:
        (place / "a/200.png").write_bytes(files["a/200.png"])
        assert len(load(place, WANTED)) == 300


def test_what_may_be_mended_without_a_change_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    place = folder(tmp_path / "set", {f"a/{i:03}.png": picture(1) for i in range(300)})
    read = images.Folder.read

    def refused(self: Any, number: int) -> bytes:
        if number == 7:
            raise PermissionError(13, "Permission denied", "x")
        return read(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(images.Folder, "read", refused)
        assert refusal(place) == "a/007.png cannot be read (Permission denied)"
    assert not cache.exists() and len(load(place, WANTED)) == 300


def test_a_cache_folder_that_cannot_be_written(made: Any, cache: Path) -> None:
    cache.parent.parent.mkdir(exist_ok=True)
    cache.parent.write_bytes(b"")
    assert len(load(made({f"a/{i:03}.png": picture(1) for i in range(300)}), WANTED)) == 300


def test_a_long_check_says_how_it_goes_on(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(check, "SECONDS", 0.01)
    big = picture(1, "JPEG", size=(1500, 1500))
    load(made({f"a/{i:03}.jpg": big for i in range(40)}), WANTED._replace(say=lines.append))
    assert lines and all(line.startswith("checking images: ") and line.endswith(" of 40, 0 bad") for line in lines)
    lines.clear()
    monkeypatch.setattr(check, "SECONDS", 60)
    load(made({"a/x.png": picture()}), WANTED._replace(say=lines.append))
    assert lines == []


def test_an_interrupted_check_ends(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "SECONDS", 0.001)
    big = picture(1, "JPEG", size=(1500, 1500))
    count = Counter[str]()
    examined = check.examine
    monkeypatch.setattr(check, "examine", lambda content: (count.update(["seen"]), examined(content))[1])
    with pytest.raises(KeyboardInterrupt):
        load(made({f"a/{i:03}.jpg": big for i in range(200)}), WANTED._replace(say=interrupt))
    assert count["seen"] < check.TOGETHER, "the images that were begun, not all that a thread took"


def test_no_warning_reaches_anybody(made: Any) -> None:
    """Of files on which Pillow warns: damaged EXIF, a TIFF's odd tags, many pixels, bytes that do not belong there."""
    tiff = bytearray(picture(1, "TIFF"))
    jpeg = picture(1, "JPEG", size=(64, 64))
    odd = [
        bytes(tiff[:40]) + b"\xff\xff" + bytes(tiff[42:]),
        jpeg[:2] + b"\xff\xe1\0\x20Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(14) + jpeg[2:],
    ]
    odd += [picture(0, size=(10_000, 9_000), mode="1"), picture(0, "PNG", mode="P", transparency=b"\x80" * 256)]
    place = made({f"a/{i}.png": content for i, content in enumerate(odd)} | {"a/x.png": picture()})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = load(place, WANTED._replace(skip_bad=True))
        found.read(torch.arange(len(found)))
        assert caught == []
        warnings.warn("still heard", stacklevel=1)
    assert len(caught) == 1


def test_no_error_of_libtiff_and_no_line_of_pillows_log_reaches_anybody(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """libtiff's own handler writes to the process's stderr; it is there again afterwards."""
    tiff = picture(1, "TIFF", size=(64, 64), compression="tiff_lzw")
    seven = bytearray(picture(1, "TIFF"))
    at = seven.index(struct.pack("<HHL", 277, 3, 1)) + 8
    seven[at : at + 2] = struct.pack("<H", 7)  # samples a pixel, of which Pillow decodes six
    files = {"a/x.tif": tiff[:8] + bytes(20) + tiff[28:], "a/y.tif": bytes(seven), "a/z.png": picture()}
    found = load(folder(tmp_path / "set", files), WANTED._replace(skip_bad=True))
    assert len(found) == 1 and capfd.readouterr() == ("", "")
    with pytest.raises(OSError, match="decoder error"):
        check.examine(files["a/x.tif"])
    assert capfd.readouterr().err and logging.getLogger("PIL").level == logging.NOTSET


def damaged(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed[: rng.randint(1, len(changed))] if rng.random() < 0.3 else changed)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF"])
def test_whatever_the_bytes_are_one_line_is_said_or_an_image_is_read(tmp_path: Path, kind: str) -> None:
    rng = random.Random(kind)
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}
    whole = [picture(100, kind, mode, size=(24, 24), **options) for mode in ("RGB", "L")]
    files = {f"a/{i:03}.png": damaged(rng.choice(whole), rng) for i in range(250)}
    place = folder(tmp_path / "set", files)
    found = load(place, WANTED._replace(skip_bad=True))
    assert len(found) + sum(key.startswith("bad: ") for key in found.contents.left_out) == 250
    assert found.read(torch.arange(len(found))).shape == (len(found), 3, 4, 4)
    assert all("\n" not in note for note in [*found.contents.notes, *found.contents.left_out])
