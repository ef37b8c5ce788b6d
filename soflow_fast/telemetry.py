"""What a user sees of a run: progress line, JSON lines, TensorBoard, sample grids. Clock readings are handed in."""

import errno
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

PLAIN_LINE_EVERY = 10.0
"""Seconds between progress lines where the output is not a terminal."""


class Progress:
    """A live line on a terminal; elsewhere a plain line every ten seconds."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self.total = total
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self._width = 0
        self._gone = False
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
            columns = os.get_terminal_size(self.stream.fileno()).columns or 80  # 0: the terminal does not know
            text = (text if len(text) < columns else text.replace("  ", " "))[: max(columns - 1, 20)]
            self._write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            self._write(text + "\n")

    def say(self, text: str) -> None:
        """A line of its own, above the live line."""
        if self.live and self._width:
            text = "\r" + " " * self._width + "\r" + text
            self._width = 0
        self._write(text + "\n")

    def _write(self, text: str) -> None:
        if self._gone:
            return
        try:
            self.stream.write(text)
            self.stream.flush()
        except BrokenPipeError:  # `train | head`: nobody reads on, and the run is worth more than its lines
            self._gone, self.live = True, False

    def close(self) -> None:
        """End the live line, so that what follows stands on a line of its own."""
        if self.live and self._width:
            self._write("\n")
            self._width = 0


class MetricsLog:
    """metrics.jsonl: one JSON object a line, ordered by step. Opening it at a step drops the lines after that step."""

    def __init__(self, path: Path, step: int) -> None:
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                    if entry["step"] > step:
                        break
                except (ValueError, KeyError, TypeError):  # a line cut off by a kill
                    break
                kept.append(line + "\n")
        replace_file(path, "".join(kept).encode())
        self._path, self._file = path, path.open("ab", buffering=0)

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append one line and hand it to the operating system: the whole line or, on a full disk, nothing of it."""
        line = (json.dumps(dict(entry)) + "\n").encode()
        before = self._path.stat().st_size
        with naming(self._path):
            try:
                if self._file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                self._file.truncate(before)
                raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """Scalars and sample grids for TensorBoard, in RUN/tensorboard."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        with naming(folder):
            self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, entry: Mapping[str, Any]) -> None:
        """Each number of `entry` under its name, at its step."""
        with naming(self._folder):
            for name, value in entry.items():
                if name != "step":
                    self._writer.add_scalar(name, value, entry["step"])

    def image(self, grid: Tensor, step: int) -> None:
        """A uint8 grid [H, W, C]."""
        with naming(self._folder):
            self._writer.add_image("samples", grid.numpy(), step, dataformats="HWC")

    def flush(self) -> None:
        """Write what is pending."""
        with naming(self._folder):
            self._writer.flush()

    def close(self) -> None:
        """Write what is pending and close."""
        with naming(self._folder):
            self._writer.close()


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
    import io

    from PIL import Image

    array = image.numpy()
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(buffer, "PNG")
    return buffer.getvalue()


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or as it was before."""
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with naming(path):
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


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
