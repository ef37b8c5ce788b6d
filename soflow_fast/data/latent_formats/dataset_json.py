""".npy per image with dataset.json, as EDM2's and REPA's dataset tools write (github.com/NVlabs/edm2, sihyun-yu/REPA).

`00000/img-mean-std-00000000.npy`, float32 [8, S, S] of mean || std, unscaled, in a folder or an uncompressed zip, with
`dataset.json` of {"labels": [[name, label], ...]} or {"labels": null}. REPA keeps such a folder as `vae-sd` beside the
`images`. Latents of another encoder are [C, H, W].
"""

import json
import os
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from ...errors import DataError
from ...files import read_file
from ..dataset import Contents, Wanted
from ..latents.layout import damage
from .foreign import (
    LARGEST_FILE,
    LARGEST_JSON,
    Foreign,
    checksum_of,
    files_below,
    from_npy,
    has_std,
    layout_of,
    numbered,
    said_of,
    starts_with,
    three_axes,
)

LABELS = "dataset.json"
REPA = "vae-sd"


def recognises(place: Path) -> bool:
    """Whether a path is a folder or zip with dataset.json and .npy files."""
    try:
        if place.is_dir():
            root = _root(place)
            return (root / LABELS).is_file() and bool(files_below(root, (".npy",), most=2000))
        if not starts_with(place, b"PK"):
            return False
        with zipfile.ZipFile(place) as archive:
            names = archive.namelist()
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile):
        return False
    return LABELS in names and any(name.endswith(".npy") for name in names[:100])


def _root(place: Path) -> Path:
    return place / REPA if (place / REPA / LABELS).is_file() else place


def load(place: Path, wanted: Wanted) -> "NpyLatents":
    """The latents of a folder or zip. Raises DataError."""
    if place.is_dir():
        root = _root(place)
        with damage(place, LABELS):
            text = read_file(root / LABELS, LARGEST_JSON, follow=True)
        with damage(place, "the folder"):
            return NpyLatents(place, root, files_below(root, (".npy",)), None, text, wanted)
    with damage(place, "the zip"), zipfile.ZipFile(place) as archive:
        infos = sorted((i for i in archive.infolist() if i.filename.endswith(".npy")), key=lambda i: i.filename)
        if archive.getinfo(LABELS).file_size > LARGEST_JSON:
            raise ValueError(f"{LABELS} has {archive.getinfo(LABELS).file_size} bytes")
        text = archive.read(LABELS)
        names = [(info.filename, info.file_size) for info in infos]
        return NpyLatents(place, place, names, infos, text, wanted)


class NpyLatents(Foreign):
    """Latents in .npy files of a folder, or in members of a zip, which any process may read at once."""

    def __init__(
        self,
        place: Path,
        root: Path,
        files: list[tuple[str, int]],
        members: list[zipfile.ZipInfo] | None,
        text: bytes,
        wanted: Wanted,
    ) -> None:
        self.place, self._root, self._files, self._members = place, root, files, members
        if not files:
            raise DataError(f"--data {place}: holds no .npy file")
        with damage(place, LABELS):
            labels = _labels(json.loads(text), [name for name, _ in files])
        with damage(place, self.name(0)):
            first = self.row(0, False)
        layout = layout_of(first.shape, has_std(first, wanted))
        contents = Contents("latents in .npy with dataset.json", notes=said_of(layout))
        super().__init__(place, layout, labels, contents, wanted, mirrors=False)
        contents.checksum = checksum_of(files, labels)

    def row(self, number: int, mirrored: bool) -> np.ndarray:
        if self._members is not None:
            return three_axes(from_npy(_member(self._root, self._members[number])))
        return three_axes(from_npy(read_file(self._root / self._files[number][0], LARGEST_FILE, follow=True)))

    def name(self, number: int) -> str:
        return self._files[number][0]


def _labels(values: dict, names: list[str]) -> torch.Tensor:
    """Labels of files by their names, int64 [n]; 0 of all where there are none. Raises ValueError."""
    if values["labels"] is None:
        return torch.zeros(len(names), dtype=torch.int64)
    known = {name: label for name, label in values["labels"]}
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
