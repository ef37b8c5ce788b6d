"""Zips of images. Nothing is unpacked to disk, and what is kept of a member is its name and a row of numbers."""

import hashlib
import itertools
import os
import struct
import weakref
import zipfile
import zlib
from array import array
from pathlib import Path

import numpy as np

from ...errors import DataError, printable
from ..dataset import Unreadable
from .listing import BEGINNING, LABELS, LARGEST_FILE, LARGEST_TEXT, Listing, is_nobodys
from .zip_directory import Member, exactly, members

HEADER = struct.Struct("<4s22xHH")
"""Of a member, as far as it is asked for: signature, lengths of the name and of what follows it."""


class Zip(Listing):
    """Members are read by what the zip's directory says of them, which is read once, here."""

    kind = "zip of images"

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self._handle = (0, -1)
        status = os.stat(place)
        self._status = status.st_size, status.st_mtime_ns
        names, rows, self._labels = [], array("q"), {}
        for told, member in members(self._open(), status.st_size):
            parts = [part for part in told.split("/") if part not in ("", ".")]
            name = "/".join(parts)
            seen = list(itertools.takewhile(lambda part: not is_nobodys(part), parts))
            if len(seen) < len(parts):
                self._add_folder("/".join(seen))
                self.left_out["hidden"] += not told.endswith("/")
            elif told.endswith("/"):
                self._add_folder(name)
            else:
                self._add_folder("/".join(parts[:-1]))
                if self._is_image(name, lambda: self._unpacked(member, BEGINNING)):  # noqa: B023
                    if told.startswith("/") or ".." in parts or "\\" in name:
                        raise DataError(f"--data {place}: {told!r} points out of the zip")
                    names.append(name)
                    rows.extend(member)
                elif parts[-1:] and parts[-1].lower() in LABELS:
                    self._labels[name] = member
        for one, next_one in itertools.pairwise(sorted(self.labels)):
            if one == next_one:
                raise DataError(f"--data {place}: {printable(one)} is in it twice")
        self._rows = self._keep(names, rows, len(Member._fields))
        self.sizes = np.ascontiguousarray(self._rows[:, Member._fields.index("size")])
        for one, next_one in itertools.pairwise(self.names):
            if one == next_one:
                raise DataError(f"--data {place}: {printable(one)} is in it twice")
        self.stamp = hashlib.sha256(repr(self._status).encode() + self._rows.tobytes()).hexdigest()

    def read(self, number: int) -> bytes:
        status = os.stat(self.place)
        if (status.st_size, status.st_mtime_ns) != self._status:
            raise Unreadable("cannot be read: the zip has changed since it was opened")
        return self._unpacked(Member(*self._rows[number].tolist()), LARGEST_FILE)

    def text(self, name: str) -> bytes:
        content = self._unpacked(self._labels[name], LARGEST_TEXT + 1)
        if len(content) > LARGEST_TEXT:
            raise Unreadable(f"has more than {LARGEST_TEXT} bytes")
        return content

    def _open(self) -> int:
        """The handle of the zip, opened once in each process."""
        process, handle = self._handle
        if process != os.getpid():
            handle = os.open(self.place, os.O_RDONLY)
            weakref.finalize(self, os.close, handle)
            self._handle = os.getpid(), handle
        return handle

    def _unpacked(self, member: Member, most: int) -> bytes:
        """The content of a member; the beginning, if it has more bytes than `most`."""
        offset, packed, size, crc, method, flags, name = member
        if flags & 0x61:
            raise Unreadable("is encrypted")
        if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # the others know no bound
            raise Unreadable("is compressed by another method than deflate")
        longest = 2 * min(size, most) + 2**16  # what is kept as it is, and some for the headers of deflate
        wrong = packed != size if method == zipfile.ZIP_STORED else size <= most and packed > longest
        if not 0 <= offset < self._status[0] or packed < 0 or wrong:
            raise zipfile.BadZipFile("its entry in the zip's directory is damaged")
        handle = self._open()
        signature, name_length, more = HEADER.unpack(exactly(handle, HEADER.size, offset))
        stored = exactly(handle, name_length, offset + HEADER.size)
        if signature != b"PK\3\4" or zlib.crc32(stored) != name:
            raise zipfile.BadZipFile("its header is not that of the zip's directory")
        start = offset + HEADER.size + name_length + more
        content = exactly(handle, min(packed, longest), start)
        if method == zipfile.ZIP_DEFLATED:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, min(size + 1, most))
        if size > most:
            return content[:most]
        if len(content) != size or zlib.crc32(content) != crc:
            raise zipfile.BadZipFile("its content is damaged")
        return content
