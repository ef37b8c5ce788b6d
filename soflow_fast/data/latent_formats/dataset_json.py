""".npy per image with dataset.json, as EDM2's and REPA's dataset tools write (github.com/NVlabs/edm2, sihyun-yu/REPA).

`00000/img-mean-std-00000000.npy`, float32 [8, S, S] of mean || std, unscaled, in a folder or an uncompressed zip, with
`dataset.json` of {"labels": [[name, label], ...]} or {"labels": null}. REPA keeps such a folder as `vae-sd` beside the
`images`. Latents of another encoder are [C, H, W].
"""

import json
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ...errors import DataError
from ...files import read_file
from ..dataset import Contents, Wanted
from ..latents.layout import damage
from .arrays import from_npy, numbered, three_axes
from .files import Files, by_path, files_below, is_hidden, names_below, starts_with
from .foreign import LARGEST_FILE, LARGEST_JSON, Foreign, has_std, layout_of, said_of

LABELS = "dataset.json"
REPA = "vae-sd"


def recognises(place: Path) -> bool:
    """Whether a path is a folder or zip with dataset.json and .npy files."""
    try:
        if place.is_dir():
            root = _root(place)
            return (root / LABELS).is_file() and bool(names_below(root, (".npy",)))
        if not starts_with(place, b"PK"):
            return False
        try:
            with zipfile.ZipFile(place) as archive:
                names = archive.namelist()
        except zipfile.BadZipFile:
            return _first_name(place).endswith(b".npy")
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile):
        return False
    return LABELS in names and any(name.endswith(".npy") for name in names[:100])


def _first_name(place: Path) -> bytes:
    """The name that the beginning of a zip tells, where its directory cannot be read."""
    with place.open("rb") as file:
        header = file.read(30)
        return file.read(int.from_bytes(header[26:28], "little"))


def _root(place: Path) -> Path:
    return place / REPA if (place / REPA / LABELS).is_file() else place


def load(place: Path, wanted: Wanted) -> "NpyLatents":
    """The latents of a folder or zip. Raises DataError."""
    if place.is_dir():
        root = _root(place)
        with damage(place, LABELS):
            text = read_file(root / LABELS, LARGEST_JSON, follow=True)
        with damage(place, "the folder"):
            files = files_below(root, (".npy",))
        return NpyLatents(place, files, None, text, wanted)
    with damage(place, "the zip"):
        files = Files(place.parent, [place.name])
        with zipfile.ZipFile(place) as archive:
            members, text = _members(archive)
    return NpyLatents(place, files, members, text, wanted)


def _members(archive: zipfile.ZipFile) -> tuple[dict[str, zipfile.ZipInfo], bytes]:
    """The .npy of a zip by their names, in the order of those of a folder, and what dataset.json holds."""
    found: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        if info.filename in found:
            raise ValueError(f"holds {info.filename} twice")
        if info.filename.endswith(".npy") and not is_hidden(info.filename):
            found[info.filename] = info
    size = archive.getinfo(LABELS).file_size
    if size > LARGEST_JSON:
        raise ValueError(f"{LABELS} has {size} bytes")
    return {name: found[name] for name in sorted(found, key=by_path)}, archive.read(LABELS)


class NpyLatents(Foreign):
    """Latents in .npy files of a folder, or in members of a zip, which any process may read at once."""

    def __init__(
        self, place: Path, files: Files, members: dict[str, zipfile.ZipInfo] | None, text: bytes, wanted: Wanted
    ) -> None:
        """files: those of the folder, or the zip with its members."""
        self.place, self._files = place, files
        self._names = files.names if members is None else list(members)
        self._members = None if members is None else list(members.values())
        if not self._names:
            raise DataError(f"--data {place}: holds no .npy file")
        with damage(place, LABELS):
            labels = _labels(json.loads(text), self._names)
        with damage(place, self.name(0)):
            first = self.row(0, False)
        layout = layout_of(first.shape, has_std(first, wanted))
        contents = Contents("latents in .npy with dataset.json", notes=said_of(layout))
        super().__init__(place, layout, labels, contents, wanted, mirrors=False)

    def row(self, number: int, mirrored: bool) -> np.ndarray:
        path = self._files.path(self.file(number))
        if self._members is not None:
            return three_axes(from_npy(_member(path, self._members[number])))
        return three_axes(from_npy(read_file(path, LARGEST_FILE, follow=True)))

    def file(self, number: int) -> int:
        return number if self._members is None else 0

    def name(self, number: int) -> str:
        return self._names[number]


def _labels(values: dict, names: Sequence[str]) -> torch.Tensor:
    """Labels of files by their names, int64 [n]; 0 of all where there are none. Raises ValueError."""
    if values["labels"] is None:
        return torch.zeros(len(names), dtype=torch.int64)
    known: dict[str, int] = {}
    for name, label in values["labels"]:
        if known.setdefault(name, label) != label:
            raise ValueError(f"gives {name} the labels {known[name]} and {label}")
    for name in names:
        if name not in known:
            raise ValueError(f"has no label of {name}")
    if len(known) > len(names):
        raise ValueError(f"has a label of {next(iter(known.keys() - set(names)))}, which is missing")
    return numbered(known[name] for name in names)


def _member(place: Path, info: zipfile.ZipInfo) -> bytes:
    """The content of a member, unpacked no further than to the length that is stated. Raises OSError and ValueError.

    Read at its position: a ZipFile's own is shared with the processes that are forked.
    """
    if info.file_size > LARGEST_FILE or info.compress_size > LARGEST_FILE or info.flag_bits & 1:
        raise ValueError(f"has {info.file_size} bytes, or is encrypted")
    handle = os.open(place, os.O_RDONLY)
    try:
        header = os.pread(handle, 30, info.header_offset)
        if header[:4] != b"PK\x03\x04" or len(header) < 30:
            raise ValueError("has no header in the zip")
        skipped = 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        content = os.pread(handle, info.compress_size, info.header_offset + skipped)
    finally:
        os.close(handle)
    if info.compress_type == zipfile.ZIP_DEFLATED:
        content = zlib.decompressobj(-15).decompress(content, info.file_size + 1)
    elif info.compress_type != zipfile.ZIP_STORED:
        raise ValueError("is compressed by another method than deflate")
    if len(content) != info.file_size or zlib.crc32(content) != info.CRC:
        raise ValueError("does not have the checksum that the zip states")
    return content
