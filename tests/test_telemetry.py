"""What a user sees of a run, piece by piece; tests/test_cli.py sees it all together."""

import errno
import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from soflow_fast import telemetry

METRICS = {"fm_loss": 0.5, "sc_loss": -0.25, "sc_mse": 2.0, "memory_mb": 321.4, "lr": 1.0}


def progress_lines(steps: list[tuple[int, float]]) -> list[str]:
    stream = io.StringIO()
    progress = telemetry.Progress(100, stream)
    for step, now in steps:
        progress.update(step, METRICS, 2.0, 123.4, now)
    return stream.getvalue().splitlines()


def test_a_plain_line_says_everything() -> None:
    assert progress_lines([(10, 0.0)]) == [
        "step 10/100  0:45 left  fm 0.500  sc -0.250  mean q^2 2.000  123 img/s  321 MB"
    ]


def test_plain_lines_come_every_ten_seconds_and_at_the_end() -> None:
    lines = progress_lines([(10, 5.0), (20, 6.0), (30, 14.9), (40, 15.1), (50, 16.0), (100, 17.0)])
    assert [line.split()[1] for line in lines] == ["10/100", "40/100", "100/100"]


def test_losses_that_a_run_does_not_have_are_left_out() -> None:
    stream = io.StringIO()
    telemetry.Progress(100, stream).update(1, {"sc_mse": 2.0, "memory_mb": 1.0}, 0.0, 1.0, 0.0)
    assert stream.getvalue() == "step 1/100  ? left  mean q^2 2.000  1 img/s  1 MB\n"


@pytest.mark.parametrize(("columns", "shown"), [(200, 200), (40, 39), (5, 20), (0, 79)])
def test_a_live_line_fits_the_terminal(columns: int, shown: int) -> None:
    import fcntl
    import pty
    import select
    import struct
    import termios

    def read(until: str) -> str:
        """What the terminal got, up to the text that is waited for: a pty may hand a write over in parts."""
        found = ""
        while not found.endswith(until) and select.select([master], [], [], 5)[0]:
            found += os.read(master, 4096).decode()
        return found

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(slave, "w") as stream:
        progress = telemetry.Progress(100, stream)
        progress.update(10, METRICS, 2.0, 123.4, 0.0)
        whole = "step 10/100  0:45 left  fm 0.500  sc -0.250  mean q^2 2.000  123 img/s  321 MB"
        expected = "\r" + (whole if len(whole) < (columns or 80) else whole.replace("  ", " "))[:shown]
        text = read(expected)
        assert text == expected
        progress.update(11, {"memory_mb": 1.0}, 2.0, 1.0, 0.0)
        progress.say("hello")
        both = read("\rhello\r\n")
        shorter = both[: len(text)]
        assert shorter.startswith("\rstep 11/100") and both[len(text)] == "\r" and both.endswith("\rhello\r\n")
        progress.close()
        progress.update(12, METRICS, 2.0, 1.0, 0.0)
        progress.close()
        assert read("\r\n").endswith("\r\n")
    os.close(master)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (754, "12:34"), (3600, "1:00:00"), (360_061, "100:01:01")]
)
def test_duration(seconds: float, text: str) -> None:
    assert telemetry.duration(seconds) == text


def test_metrics_log_drops_what_comes_after_its_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = telemetry.MetricsLog(path, 0)
    for step in (2, 4, 6):
        log.write({"step": step, "loss": 0.5})
    log.close()
    path.write_text(path.read_text() + '{"step": 8, "lo')  # cut off by a kill
    log = telemetry.MetricsLog(path, 4)
    log.write({"step": 6, "loss": 0.25})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 2, "loss": 0.5},
        {"step": 4, "loss": 0.5},
        {"step": 6, "loss": 0.25},
    ]
    log.close()


def test_metrics_log_on_a_full_disk_keeps_whole_lines(mount: Callable[..., Path]) -> None:
    disk = mount("size=8k")
    path = disk / "metrics.jsonl"
    log = telemetry.MetricsLog(path, 0)
    with pytest.raises(OSError, match=r"No space left on device: '.*/metrics.jsonl'") as error:
        for step in range(1, 10_000):
            log.write({"step": step, "text": "x" * 100})
    assert error.value.errno == errno.ENOSPC
    log.close()
    lines = path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1)) and len(lines) > 10


def test_replace_file_is_whole_or_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    telemetry.replace_file(path, b"old")

    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match=r"No space left on device: '.*/x.json'"):
            telemetry.replace_file(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x.json"]
    telemetry.replace_file(path, b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["x.json"]


def test_images_become_bytes() -> None:
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).reshape(1, 1, 1, 5)
    assert telemetry.to_uint8(x).flatten().tolist() == [0, 0, 128, 255, 255]
    assert [telemetry.to_uint8(torch.zeros(2, c, 4, 4)).shape[3] for c in (1, 2, 3, 4)] == [1, 1, 3, 3]
    channels = torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 3, 1, 1)
    assert telemetry.to_uint8(channels).shape == (1, 1, 1, 3)
    assert telemetry.to_uint8(channels).flatten().tolist() == [0, 128, 255]


def test_a_grid_shows_every_image_in_its_place() -> None:
    images = torch.arange(7, dtype=torch.uint8).reshape(7, 1, 1, 1).expand(7, 8, 8, 1) * 10
    grid = telemetry.make_grid(images, columns=3)
    assert grid.shape == (3 * 42 + 2, 3 * 42 + 2, 1)  # enlarged fivefold, 2 pixels apart
    centres = grid[22::42, 22::42, 0]
    assert centres.flatten().tolist() == [0, 10, 20, 30, 40, 50, 60, 128, 128]
    assert telemetry.make_grid(images[:1]).shape == (44, 44, 1)
    assert telemetry.make_grid(torch.zeros(10, 64, 64, 3, dtype=torch.uint8)).shape == (3 * 66 + 2, 4 * 66 + 2, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_gives_the_image_back(channels: int) -> None:
    image = torch.arange(12 * channels, dtype=torch.uint8).reshape(3, 4, channels)
    with Image.open(io.BytesIO(telemetry.png(image))) as read:
        assert read.format == "PNG" and read.size == (4, 3)
        assert list(read.tobytes()) == image.flatten().tolist()


def test_a_reader_that_goes_away_does_not_end_the_run() -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    progress = telemetry.Progress(10, Broken())
    progress.say("one")
    progress.update(10, {"memory_mb": 1.0}, 1.0, 1.0, 100.0)
    progress.close()
