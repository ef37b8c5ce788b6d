"""What a user sees of a run: progress line, JSON lines, TensorBoard, sample grids. Clock readings are handed in."""

import errno
import io
import json
import os
import socket
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from .. import files
from ..errors import printable

PLAIN_LINE_EVERY = 10.0
"""Seconds between progress lines where the output is not a terminal."""
GONE = (errno.EPIPE, errno.EIO, errno.EBADF)
"""What a reader that went away gives, a terminal that was closed, and a closed file."""


class Progress:
    """A live line on a terminal; elsewhere a plain line every ten seconds. Nothing that becomes of the output, or of
    what it cannot encode, ends the run."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self.total = total
        known: TextIO | None = stream or sys.stdout  # None where it was closed before Python began
        self._gone = known is None or getattr(known, "closed", False)
        self.stream = known or io.StringIO()
        self.live = not self._gone and self.stream.isatty()
        self._width = 0
        self._last = float("-inf")

    def update(self, step: int, metrics: Mapping[str, float], rate: float, images: float, now: float) -> None:
        """Show step `step` at `now` seconds: `metrics`, `rate` steps/s and `images` images/s."""
        if not self.live and now - self._last < PLAIN_LINE_EVERY and step < self.total:
            return
        self._last = now
        left = (self.total - step) / rate if rate else float("inf")
        parts = [f"step {step}/{self.total}", f"{duration(left)} left"]
        names = {"fm_loss": "fm", "sc_loss": "sc", "sc_mse": "mean q^2"}
        parts += [f"{label} {metrics[name]:.3f}" for name, label in names.items() if name in metrics]
        parts += [f"{images:.0f} img/s", f"{metrics['memory_mb']:.0f} MB"]
        text = "  ".join(parts)
        if self.live:
            columns = self._columns()
            text = (text if len(text) < columns else text.replace("  ", " "))[: max(columns - 1, 20)]
            self._write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            self._write(text + "\n")

    def say(self, text: str) -> None:
        """A line of its own, above the live line. What names of files may do to a terminal is made visible."""
        text = printable(text)
        if self.live and self._width:
            text = "\r" + " " * self._width + "\r" + text
            self._width = 0
        self._write(text + "\n")

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self.stream.fileno()).columns or 80  # 0: the terminal does not know
        except OSError:  # one that was closed
            return 80

    def _write(self, text: str) -> None:
        if self._gone:
            return
        try:
            encoding = getattr(self.stream, "encoding", None) or "utf-8"
            self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            self.stream.flush()
        except ValueError:  # closed meanwhile
            self._gone, self.live = True, False
        except OSError as error:
            if error.errno in GONE or isinstance(error, BrokenPipeError):  # as `train | head`, or a terminal's window
                self._gone, self.live = True, False
            # Of a full disk a later line may find room; what it refuses is lost here, and is in metrics.jsonl.

    def close(self) -> None:
        """End the live line, so that what follows stands on a line of its own."""
        if self.live and self._width:
            self._write("\n")
            self._width = 0


class Appended:
    """A file that grows by whole pieces. What the disk refuses stays in memory, in order, for the next time.

    The first refusal in a row is told to `warn`. What is kept is a logged step's numbers, about 600 bytes with those of
    TensorBoard: 60 MB of host memory after 100 000 such lines. The file is open only while it is written to: a disk can
    be made read-only meanwhile, and NFS tells of a quota when a file is closed.
    """

    def __init__(self, path: Path, what: str, warn: Callable[[str], None], size: int = 0) -> None:
        self._path, self._what, self._warn = path, what, warn
        self._whole, self._kept, self._refused = size, [], False
        self._unsynced: OSError | None = None

    def add(self, piece: bytes, keep: bool = True) -> None:
        """Append `piece`, after those that are kept; one that is refused is kept in turn, or forgotten."""
        self._tell()
        self._kept.append(piece)
        try:
            self._write()
        except OSError as error:
            if not keep:
                self._kept.pop()
            if not self._refused:
                self._warn(f"{self._what} not written, kept in memory until it can be: {error}")
            self._refused = True
        else:
            self._refused = False

    def sync(self) -> None:
        """Have the disk keep what was written, however the machine ends; in another thread than `add`, if need be. A
        refusal is told by the next `add` or `close`: nothing that waits for this is to fail of it."""
        try:
            with naming(self._path):
                handle = os.open(self._path, os.O_RDONLY)
                try:
                    getattr(os, "fdatasync", os.fsync)(handle)
                finally:
                    os.close(handle)
        except OSError as error:
            self._unsynced = error

    def finish(self) -> None:
        """Write what is still kept, for the last time. Raises OSError."""
        try:
            if self._kept:
                self._write()
        finally:
            self._kept.clear()

    def close(self) -> None:
        """`finish`, with a warning in place of the error."""
        self._tell()
        try:
            self.finish()
        except OSError as error:
            self._warn(f"{self._what} lacks its end, which was never written: {error}")

    def _tell(self) -> None:
        if self._unsynced:
            self._warn(f"{self._what} may lack its last lines if the machine stops: {self._unsynced}")
            self._unsynced = None

    def _write(self) -> None:
        with naming(self._path):
            written, refusal = 0, None
            with self._path.open("ab", buffering=0) as file:
                size = file.seek(0, os.SEEK_END)
                if size > self._whole:  # a part of a piece that could not be taken back at once
                    file.truncate(self._whole)
                end = min(size, self._whole)
                try:
                    for piece in self._kept:
                        rest = memoryview(piece)
                        while rest:  # a disk that is nearly full takes a part, and names its reason the next time
                            rest = rest[file.write(rest) :]
                        end, written = end + len(piece), written + 1
                except OSError as error:
                    refusal = error
                    file.truncate(end)
            self._whole = end  # only now, as closing may have failed
            del self._kept[:written]
            if refusal:
                raise refusal


class MetricsLog(Appended):
    """metrics.jsonl: one JSON object a line, ordered by step.

    Opening it at a step drops the lines after that step, and a last one that was cut off; damaged lines stay where they
    are, and are told to `warn`.
    """

    def __init__(self, path: Path, step: int, warn: Callable[[str], None]) -> None:
        kept, damaged = lines_until(path.read_bytes(), step) if path.exists() else ([], [])
        if damaged:
            which = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
            warn(f"{path}: damaged in line{'s' if len(damaged) > 1 else ''} {which}; left as it is")
        content = b"".join(line + b"\n" for line in kept)
        replace_file(path, content, sync=True)
        super().__init__(path, path.name, warn, len(content))

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append one line and hand it to the operating system: the whole line or, on a full disk, nothing of it."""
        self.add((json.dumps(dict(entry)) + "\n").encode())


def lines_until(content: bytes, step: int) -> tuple[list[bytes], list[int]]:
    """The lines of metrics.jsonl up to that of `step`, and the numbers, from 1, of the damaged ones among them."""
    lines = content.split(b"\n")
    if b"}" not in lines[-1]:  # cut off by a kill, or the empty rest after the last line's end
        lines.pop()
    steps = [_step(line) for line in lines]
    whole = in_order(steps)
    until = next((i for i in whole if (steps[i] or 0) > step), len(lines))
    known = set(whole)
    return lines[:until], [i + 1 for i in range(until) if i not in known]


def _step(line: bytes) -> int | None:
    """The step of a line of metrics.jsonl; None if it is damaged."""
    try:
        found = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if type(found) is int else None


def in_order(values: Sequence[int | None]) -> list[int]:
    """Where the longest row of rising values is: a value that damage has changed is in most cases not in it."""
    ends: list[int] = []  # by length, less one: where the row of that length ends that ends with the least value
    least: list[int] = []
    before: dict[int, int | None] = {}
    for i, value in enumerate(values):
        k = len(least) if value is None else bisect_left(least, value)
        if value is None or least[k : k + 1] == [value]:  # of equal ones the first
            continue
        least[k : k + 1], ends[k : k + 1] = [value], [i]
        before[i] = ends[k - 1] if k else None
    found, at = [], ends[-1] if ends else None
    while at is not None:
        found.append(at)
        at = before[at]
    return found[::-1]


class TensorBoard:
    """Scalars and sample grids for TensorBoard, in RUN/tensorboard. `clock` gives seconds since 1970.

    Not torch's SummaryWriter: its thread dies of a full disk with all that is queued, leaves a part of a record behind,
    and the error comes up at whichever call happens to be the next one.
    """

    def __init__(self, folder: Path, step: int, clock: Callable[[], float], warn: Callable[[str], None]) -> None:
        with naming(folder):
            folder.mkdir(exist_ok=True)
        # TensorBoard takes the files that have "tfevents" in their names, in the order of these.
        name = f"events.out.tfevents.{clock():010.0f}.{socket.gethostname()}.{os.getpid()}.{step}"
        self._clock, self._file = clock, Appended(folder / name, folder.name, warn)
        self._append(file_version="brain.Event:2")
        self._append(step=step + 1, session_log={"status": 1})  # a start: hides what earlier ones had from here on

    def write(self, entry: Mapping[str, Any]) -> None:
        """Each number of `entry` under its name, at its step."""
        values = [{"tag": name, "simple_value": value} for name, value in entry.items() if name != "step"]
        self._append(step=entry["step"], summary={"value": values})

    def image(self, grid: Tensor, content: bytes, step: int) -> None:
        """A uint8 grid [H, W, C], with what `png` made of it. It is forgotten where the disk refuses it."""
        H, W, C = grid.shape
        image = {"height": H, "width": W, "colorspace": C, "encoded_image_string": content}
        self._append(step=step, summary={"value": [{"tag": "samples", "image": image}]}, keep=False)

    def close(self) -> None:
        """Write what is kept, or warn that it never was."""
        self._file.close()

    def _append(self, keep: bool = True, **fields: Any) -> None:
        from tensorboard.compat.proto import event_pb2 as protocol
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        messages: Any = protocol  # made when it is imported: nothing in it has a type
        RecordWriter(record).write(messages.Event(wall_time=self._clock(), **fields).SerializeToString())
        self._file.add(record.getvalue(), keep)


def to_uint8(x: Tensor) -> Tensor:
    """Images [N, C, H, W] in [-1, 1] -> uint8 [N, H, W, C] with C 1 or 3; of other channel counts the first three."""
    x = x.detach().float().cpu()
    x = x if x.shape[1] in (1, 3) else x[:, :3] if x.shape[1] > 3 else x[:, :1]
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def make_grid(images: Tensor, columns: int = 0, least: int = 40) -> Tensor:
    """uint8 images [N, H, W, C] side by side, [H', W', C]; small ones enlarged to `least` pixels by whole factors."""
    n, H, _, C = images.shape
    columns = columns or round(n**0.5 + 0.49)
    scale = max(1, -(-least // H))
    images = images.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    gap, rows = 2, -(-n // columns)
    height, width = images.shape[1] + gap, images.shape[2] + gap
    grid = torch.full((rows * height + gap, columns * width + gap, C), 128, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = gap + (i // columns) * height, gap + (i % columns) * width
        grid[top : top + height - gap, left : left + width - gap] = image
    return grid


def png(image: Tensor) -> bytes:
    """A uint8 image [H, W, C] as the bytes of a PNG file."""
    from PIL import Image

    array = image.numpy()
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(buffer, "PNG")
    return buffer.getvalue()


def replace_file(path: Path, content: bytes, sync: bool = False) -> None:
    """Write a file so that it is there whole or as it was before. sync: also if the machine stops, and for good."""
    files.write_file(path, content, synced=sync)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError inside name `path`: a full disk names no file, and the user does not know our temporary ones."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def duration(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    if seconds == float("inf"):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
