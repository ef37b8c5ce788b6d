"""What a rank other than 0 would print: nothing on stdout, and stderr's lines in a file of its own."""

import io
import os
import tempfile
import threading
from contextlib import suppress
from datetime import datetime
from functools import cache
from pathlib import Path

from ...errors import printable

MOST_KEPT = 1000
"""Lines that are kept before there is a file."""


class Notes(io.TextIOBase):
    """A stream whose lines go to warnings-rank-00003.txt, each with the time. What one write holds is one line.

    Lines that come before `keep_in` are kept. A disk that refuses them loses them: nothing depends on them.
    """

    encoding = "utf-8"

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.name = f"warnings-rank-{rank:05d}.txt"
        self.folder: Path | None = None
        self._text, self._kept, self._lock = "", list[str](), threading.Lock()

    def keep_in(self, folder: Path) -> None:
        """Write the lines, those before as well, to a file in a folder, which is there."""
        with self._lock:
            self.folder = folder
            self._put()

    def kept_apart(self) -> str:
        """The name of a file to which the lines go that have no folder yet, in the current one or that of temporary
        files; empty: they have one, or no disk takes them."""
        name = f"soflow-rank-{self.rank}-{os.getpid()}.txt"
        for folder in (Path.cwd, tempfile.gettempdir):
            with self._lock, suppress(OSError):
                if self.folder is not None or not self._kept:
                    return ""
                path = Path(folder()) / name
                with open(path, "x", encoding="utf-8", errors="backslashreplace") as file:
                    file.writelines(self._kept)
                return str(path)
        return ""

    def write(self, text: str) -> int:
        with self._lock:
            self._text += text
            if self._text.endswith("\n"):
                self._add(" ".join(self._text.split("\n")))
                self._text = ""
        return len(text)

    def note(self, text: str) -> None:
        """Add a line, or some."""
        with self._lock:
            for line in text.splitlines():
                self._add(line)

    def writable(self) -> bool:
        return True

    def _add(self, text: str) -> None:
        if text.strip() and len(self._kept) < MOST_KEPT:
            now = datetime.now().astimezone().isoformat(timespec="seconds")
            self._kept.append(f"{now} {printable(text.rstrip())}\n")
            self._put()

    def _put(self) -> None:
        if self.folder is None or not self._kept:
            return
        try:
            with open(self.folder / self.name, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(self._kept)
        except OSError:
            pass
        self._kept.clear()


@cache
def of_rank(rank: int) -> Notes:
    """The notes of this process, which is that rank."""
    return Notes(rank)
