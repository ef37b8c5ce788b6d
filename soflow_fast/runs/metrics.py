"""The numbers of a run on disk: metrics.jsonl and TensorBoard. A disk that refuses them does not end the run."""

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import OptionalWrites, write_file

FLUSH_SECONDS = 30
"""Seconds that TensorBoard's points may wait for the next write."""


class MetricsLog:
    """metrics.jsonl: one JSON object a line, ordered by step.

    Opened at the step of a checkpoint, the log is cut after that step's line; a last line that is damaged or was cut
    off goes too. A line that the disk refuses is lost, and `warn` is told of the first one in a row; what is on the
    disk stays whole lines. The file is open only while it is written to: a disk can be made read-only meanwhile, and
    NFS reports an exceeded quota when a file is closed. Raises OSError if the log cannot be opened.
    """

    def __init__(self, path: Path, step: int, warn: Callable[[str], None]) -> None:
        self.path, self._optional = path, OptionalWrites(warn)
        content = lines_until(path.read_bytes(), step) if path.exists() else b""
        write_file(path, content)
        self._size, self._unsynced = len(content), False

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append one line and hand it to the operating system."""
        line = (json.dumps(dict(entry)) + "\n").encode()
        with (
            self._optional(f"{self.path.name} from step {entry['step']} on"),
            self.path.open("ab", buffering=0) as file,
        ):
            size = file.seek(0, os.SEEK_END)
            end = min(size, self._size)
            if size > end:  # a refused line has left a part of itself
                file.truncate(end)
            rest = memoryview(line)
            while rest:  # a disk that is nearly full takes a part, and names its reason the next time
                rest = rest[file.write(rest) :]
            self._size = end + len(line)

    def sync(self, warn: Callable[[str], None]) -> None:
        """Have the disk keep what was written, however the machine ends. `warn` is told of the first failure in a row:
        the checkpoint that waits for this can be written all the same."""
        try:
            handle = os.open(self.path, os.O_RDONLY)
            try:
                getattr(os, "fdatasync", os.fsync)(handle)
            finally:
                os.close(handle)
        except OSError as error:
            if not self._unsynced:
                warn(f"{self.path.name} may lack its last lines if the machine stops: {error}")
            self._unsynced = True
        else:
            self._unsynced = False


def lines_until(content: bytes, step: int) -> bytes:
    """The content of metrics.jsonl up to the last line of `step` or an earlier one."""
    lines = content.split(b"\n")
    whole = [i for i, line in enumerate(lines) if _step(line) <= step]
    return b"".join(line + b"\n" for line in lines[: whole[-1] + 1]) if whole else b""


def _step(line: bytes) -> float:
    """The step of a line of metrics.jsonl; infinity if the line is damaged."""
    try:
        found = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf")
    return found if type(found) is int else float("inf")


class TensorBoard:
    """Scalars and sample grids in RUN/tensorboard, by torch's SummaryWriter.

    After a start at `step` TensorBoard hides what earlier starts had from the step after it on. The first error of the
    writer, such as that of a full disk, is told to `warn`, and the run goes on without TensorBoard.
    """

    def __init__(self, folder: Path, step: int, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._writer: Any = None
        self._plain_hook, threading.excepthook = threading.excepthook, self._hook
        with self._optional():
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=step + 1, flush_secs=FLUSH_SECONDS)

    def write(self, entry: Mapping[str, Any]) -> None:
        """Each number of `entry` under its name, at its step."""
        with self._optional():
            for name, value in entry.items():
                if self._writer and name != "step":
                    self._writer.add_scalar(name, value, entry["step"])

    def image(self, grid: Tensor, step: int) -> None:
        """A uint8 grid [H, W, C] of samples."""
        with self._optional():
            if self._writer:
                self._writer.add_image("samples", grid.numpy(), step, dataformats="HWC")

    def flush(self) -> None:
        """Wait until all is written: a resumed run would not write it again."""
        with self._optional():
            if self._writer:
                self._writer.flush()

    def close(self) -> None:
        """Write the rest and end the writer's thread."""
        with self._optional():
            if self._writer:
                self._writer.close()
        if threading.excepthook == self._hook:
            threading.excepthook = self._plain_hook

    @contextmanager
    def _optional(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            writer, self._writer = self._writer, None
            self._warn(f"tensorboard not written from here on: {error}")
            with suppress(Exception):
                if writer:
                    writer.close()

    def _hook(self, arguments: threading.ExceptHookArgs) -> None:
        """Keep the traceback of the writer's thread off stderr: its error is raised at the next call, and told then."""
        if not isinstance(arguments.exc_value, OSError):
            self._plain_hook(arguments)


class Boards:
    """Several boards, such as a TensorBoard and a `tracking.Tracker`, as one."""

    def __init__(self, *boards: Any) -> None:
        self._boards = boards

    def write(self, entry: Mapping[str, Any]) -> None:
        """Each number of `entry` under its name, at its step."""
        for board in self._boards:
            board.write(entry)

    def image(self, grid: Tensor, step: int) -> None:
        """A uint8 grid [H, W, C] of samples."""
        for board in self._boards:
            board.image(grid, step)

    def flush(self) -> None:
        """As the boards do."""
        for board in self._boards:
            board.flush()

    def close(self) -> None:
        """As the boards do."""
        for board in self._boards:
            board.close()


def named_figures(figures: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """Figures by number of network calls, under the names of their curves: eval_frechet of one, eval_frechet_nfe2 of
    two."""
    return {
        f"eval_{name}" + (f"_nfe{nfe}" if nfe > 1 else ""): value
        for nfe, values in figures.items()
        for name, value in values.items()
    }


class NoLog:
    """In the place of all on a rank that writes nothing."""

    def write(self, entry: Mapping[str, Any]) -> None:
        """As `MetricsLog.write` and `TensorBoard.write`."""

    def sync(self, warn: Callable[[str], None]) -> None:
        """As `MetricsLog.sync`."""

    def image(self, grid: Tensor, step: int) -> None:
        """As `TensorBoard.image`."""

    def flush(self) -> None:
        """As `TensorBoard.flush`."""

    def close(self) -> None:
        """As `TensorBoard.close`."""
