"""Folders of images. What is kept of a file is its name and two numbers."""

import errno
import hashlib
import os
import stat
from array import array
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ...files import read_file
from ..dataset import Unreadable
from .listing import BEGINNING, LARGEST_TEXT, Listing, is_nobodys

NO_FILE = (0, -(2**63))
"""Size and time of what has an image's name and is none."""


class Folder(Listing):
    """Links are followed, but not to a folder that was seen in the same class."""

    kind = "folder of images"

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        names, rows = [], array("q")
        for name, status in self._walk():
            row = (status.st_size, status.st_mtime_ns) if status and stat.S_ISREG(status.st_mode) else NO_FILE
            if self._is_image(name, lambda: self._beginning(name) if row != NO_FILE else b""):  # noqa: B023
                names.append(name)
                rows.extend(row)
        table = self._keep(names, rows, 2)
        self.sizes, self._times = np.ascontiguousarray(table[:, 0]), np.ascontiguousarray(table[:, 1])
        self.stamp = hashlib.sha256(self._times.tobytes()).hexdigest()

    def _walk(self) -> Iterator[tuple[str, os.stat_result | None]]:
        """All files, by their paths in the folder; None: a link to nothing.

        A folder is entered once for each class: `seen` is the class's own below what is `around` the classes.
        """
        seen: set[tuple[int, int]] = set()
        waiting = deque([("", seen, False, True)])
        while waiting:
            folder, seen, hidden, around = waiting.pop()
            path = os.path.join(self.place, folder)
            try:
                known = os.stat(path)
                with os.scandir(path) as found:
                    entries = list(found)
            except OSError:
                if hidden:
                    continue
                raise
            if (known.st_dev, known.st_ino) in seen:  # a link back up, or to another folder of the class
                continue
            seen.add((known.st_dev, known.st_ino))
            inner = []
            if not hidden:
                self._add_folder(folder)
            for entry in entries:
                name, nobodys = f"{folder}/{entry.name}".lstrip("/"), hidden or is_nobodys(entry.name)
                try:
                    status = entry.stat()
                except OSError as error:
                    if not nobodys and error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                        raise
                    status = None
                if status and stat.S_ISDIR(status.st_mode):
                    if not (nobodys and entry.is_symlink()):
                        inner.append((name, nobodys, entry.is_symlink()))
                elif nobodys:
                    self.left_out["hidden"] += 1
                else:
                    yield name, status
            classes = around and sum(not nobodys for _, nobodys, _ in inner) > 1
            for name, nobodys, link in inner:
                # Links wait until all that is no link was seen.
                add = waiting.appendleft if link else waiting.append
                add((name, set(seen) if classes else seen, nobodys, around and not classes))

    def _beginning(self, name: str) -> bytes:
        with open(os.path.join(self.place, name), "rb", buffering=0) as file:
            return file.read(BEGINNING)

    def read(self, number: int) -> bytes:
        path, size, time = Path(self.place, self.names[number]), int(self.sizes[number]), int(self._times[number])
        if (size, time) == NO_FILE:
            raise Unreadable("is no file, or a link to none")
        status = path.stat()
        if (status.st_size, status.st_mtime_ns) != (size, time):
            raise Unreadable("has changed since the data set was opened")
        return read_file(path, size, follow=True)

    def text(self, name: str) -> bytes:
        return read_file(Path(self.place, name), LARGEST_TEXT, follow=True)
