"""What a user sees of a run, piece by piece; tests/test_cli.py sees it all together."""

import copy
import errno
import io
import json
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from soflow_fast.runs import telemetry

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
    log = telemetry.MetricsLog(path, 0, pytest.fail)
    for step in (2, 4, 6):
        log.write({"step": step, "loss": 0.5})
    log.close()
    path.write_text(path.read_text() + '{"step": 8, "lo')  # cut off by a kill
    log = telemetry.MetricsLog(path, 4, pytest.fail)
    log.write({"step": 6, "loss": 0.25})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 2, "loss": 0.5},
        {"step": 4, "loss": 0.5},
        {"step": 6, "loss": 0.25},
    ]
    log.close()


def opened(content: bytes, step: int, path: Path) -> tuple[list[bytes], list[str]]:
    """The lines of a log with `content` after it was opened at `step`, and the warnings."""
    warnings: list[str] = []
    path.write_bytes(content)
    telemetry.MetricsLog(path, step, warnings.append).close()
    left = path.read_bytes()
    assert left.endswith(b"\n") or not left
    return left.splitlines(keepends=True), warnings


def is_a_line(text: bytes) -> bool:
    try:
        return type(json.loads(text)["step"]) is int
    except (ValueError, KeyError):
        return False


@pytest.mark.parametrize("step", [20, 14, 13])
def test_a_flipped_bit_in_the_log_costs_no_other_line(step: int) -> None:
    """Every bit of every byte: the other lines are as they were. What it has changed stays in its place and is named,
    unless it is a line of some step still, which only the lines around it can show to be wrong."""
    lines = [json.dumps({"step": k, "loss": k / 7}).encode() for k in range(2, 21, 2)]
    content = b"".join(line + b"\n" for line in lines)
    named = 0
    for place in range(len(content)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            parts = bytes(damaged).rstrip(b"\n").split(b"\n")
            left, numbers = telemetry.lines_until(bytes(damaged), step)
            untouched = [line for line in lines if line in parts and json.loads(line)["step"] <= step]
            assert [line for line in left if line in lines] == untouched
            changed = [line for line in parts if line not in lines]
            of = 2 * content[:place].count(b"\n") + 2
            if of <= step and not all(map(is_a_line, changed)):
                assert left == [*(line for line in parts[: len(left)])] and set(changed) <= set(left)
                assert numbers == [i + 1 for i, line in enumerate(parts) if line in changed]
                named += 1
    before = content.index(lines[step // 2]) if step < 20 else len(content)
    assert named > 4 * before, "half of all"


@pytest.mark.parametrize(
    ("steps", "kept", "named"),
    [
        ([2, 4, 6, 94, 10, 12], 6, "line 4;"),
        ([2, 90, 91, 8, 10, 12, 14], 6, "lines 2, 3;"),
        ([2, 4, 6, 8, 10, 16, 12, 18, 20], 7, "line 6;"),
        ([2, 4, 6, 8, 10, 94, 12, 18, 20], 7, "line 6;"),
        ([2, 4, 6, 8, 10, 16, 8, 18, 20], 5, ""),
        ([2, 4, "6", None, 10, 10, True, 12, 14], 8, "lines 3, 4, 6, 7;"),
        ([*range(1, 12), 0, 0, 0, 0, 0, 0, 12], 18, "lines 12, 13, 14, 15, 16, ...;"),
        ([], 0, ""),
    ],
    ids=str,
)
def test_lines_out_of_order_are_damaged(steps: list[Any], kept: int, named: str, tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "at": i}).encode() + b"\n" for i, step in enumerate(steps)]
    left, warnings = opened(b"".join(lines), 12, tmp_path / "metrics.jsonl")
    assert len(warnings) == bool(named) and all(f"damaged in {named} left as it is" in text for text in warnings)
    assert left == lines[:kept]


@pytest.mark.parametrize(
    "junk", [b"\xff\xfe", b"\0" * 40, b"[" * 5000, b'{"step": ' + b"9" * 5000 + b"}", b"7", b"", b"{}"]
)
def test_a_line_of_junk_stays(junk: bytes, tmp_path: Path) -> None:
    first, last = b'{"step": 2}\n', b'{"step": 4}\n'
    left, warnings = opened(first + junk + b"\n" + last, 4, tmp_path / "metrics.jsonl")
    assert left == [first, junk + b"\n", last] and "damaged in line 2;" in warnings[0] and len(warnings) == 1


@pytest.mark.parametrize("torn", [b'{"step": 6, "lo', b"\0" * 100, b"\xff"])
def test_a_last_line_that_was_cut_off_goes(torn: bytes, tmp_path: Path) -> None:
    lines = [b'{"step": 2}\n', b'{"step": 4}\n']
    assert opened(b"".join(lines) + torn, 6, tmp_path / "metrics.jsonl") == (lines, [])
    assert opened(b"".join(lines)[:-1], 6, tmp_path / "metrics.jsonl") == (lines, []), "only its end was lost"


class Disk:
    """Takes `room` bytes more in files opened by Path.open for appending, and then refuses with `number`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        plain, disk = Path.open, self
        self.room, self.number, self.truncates, self.closes = 10**6, errno.ENOSPC, True, True

        class File(io.FileIO):
            def write(self, content: Any) -> int:
                count = min(disk.room, len(content))
                if not count:
                    raise OSError(disk.number, os.strerror(disk.number))
                disk.room -= count
                return super().write(bytes(content[:count]))

            def truncate(self, size: int | None = None) -> int:
                if not disk.truncates:
                    raise OSError(disk.number, os.strerror(disk.number))
                return super().truncate(size)

            def close(self) -> None:
                fails = not (self.closed or disk.closes)
                super().close()
                if fails:
                    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

        monkeypatch.setattr(
            Path,
            "open",
            lambda path, mode="r", *a, **k: File(path, mode) if "a" in mode else plain(path, mode, *a, **k),
        )


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("truncates", [True, False])
def test_lines_that_the_disk_refuses_come_with_a_later_one(
    number: int, truncates: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every number of bytes that may fit of four lines: of each line some are there, or all, or none."""
    for room in range(4 * 12 + 1):
        disk, warnings, path = Disk(monkeypatch), [], tmp_path / f"{room}.jsonl"
        log = telemetry.MetricsLog(path, 0, warnings.append)
        log.write({"step": 0})
        disk.room, disk.number, disk.truncates = room, number, truncates
        for step in range(1, 4):
            log.write({"step": step})
        text = path.read_text()
        assert text.startswith('{"step": 0}\n') and (not truncates or text.endswith("\n"))
        refused = room < 3 * 12
        assert len(warnings) == refused
        for warning in warnings:
            assert f"{room}.jsonl not written, kept in memory until it can be: [Errno {number}]" in warning
        disk.room, disk.truncates = 10**6, True
        log.write({"step": 4})
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 3, 4]
        disk.room = 3
        log.write({"step": 5})
        assert len(warnings) == refused + 1, "a new row of refusals has a warning of its own"
        log.close()
        assert warnings[-1].startswith(f"{room}.jsonl lacks its end, which was never written: [Errno {number}]")
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 3, 4]
        log.close()
        assert len(warnings) == refused + 2


def test_a_quota_that_is_told_of_at_closing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NFS does: whether the line is there is not known, so it is written again in the same place."""
    disk, warnings, path = Disk(monkeypatch), [], tmp_path / "metrics.jsonl"
    log = telemetry.MetricsLog(path, 0, warnings.append)
    disk.closes = False
    log.write({"step": 1})
    log.write({"step": 2})
    disk.closes = True
    log.write({"step": 3})
    log.finish()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3] and len(warnings) == 1


def test_metrics_log_on_a_full_disk_keeps_whole_lines(mount: Callable[..., Path]) -> None:
    disk, warnings = mount("size=8k"), []
    path = disk / "metrics.jsonl"
    log = telemetry.MetricsLog(path, 0, warnings.append)
    for step in range(1, 101):
        log.write({"step": step, "text": "x" * 100})
    assert len(warnings) == 1 and "No space left on device: '" in warnings[0]
    lines = path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1)) and 10 < len(lines) < 100
    with pytest.raises(OSError, match=r"No space left on device: '.*/metrics.jsonl'"):
        copy.deepcopy(log).finish()
    subprocess.run(["mount", "-o", "remount,size=64k", str(disk)], check=True)
    log.finish()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(1, 101))


@pytest.mark.parametrize("room", [0, 1, 60, 100, 500, 1000])
def test_tensorboard_has_what_a_full_disk_refused_but_no_grid(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    disk, warnings = Disk(monkeypatch), []
    disk.room = room
    threads = threading.active_count()
    board = telemetry.TensorBoard(tmp_path / "tensorboard", 3, lambda: 1234.5, warnings.append)
    grid = torch.arange(24_000, dtype=torch.uint8).reshape(80, 100, 3)
    for step in range(4, 40):
        board.write({"step": step, "loss": step / 2, "lr": 0.5})
    board.image(grid, telemetry.png(grid), 39)
    assert len(warnings) == 1 and warnings[0].startswith("tensorboard not written, kept in memory until it can be: ")
    disk.room = 10**6
    board.write({"step": 40, "loss": 20.0, "lr": 0.5})
    board.image(grid, telemetry.png(grid), 40)
    board.close()
    assert len(warnings) == 1 and threading.active_count() == threads
    read = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    found = [(point.step, point.value, point.wall_time) for point in read.Scalars("loss")]
    assert found == [(step, step / 2, 1234.5) for step in range(4, 41)]
    assert [(i.step, i.width, i.height, i.encoded_image_string) for i in read.Images("samples")] == [
        (40, 100, 80, telemetry.png(grid))
    ]


def test_tensorboard_shows_a_step_once_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for started, first, last in ((9.0, 0, 6), (1e9, 3, 8)):
        board = telemetry.TensorBoard(tmp_path / "tensorboard", first, lambda: started, pytest.fail)  # noqa: B023
        for step in range(first + 1, last + 1):
            board.write({"step": step, "loss": float(first)})
        board.close()
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(point.step, point.value) for point in read.Scalars("loss")] == [
        *((step, 0.0) for step in (1, 2, 3)),
        *((step, 3.0) for step in (4, 5, 6, 7, 8)),
    ]


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


def test_output_that_is_refused_comes_later(tmp_path: Path) -> None:
    """A progress line or warning to a file on a full disk: the buffer keeps it, and the run goes on."""

    class Full(io.RawIOBase):
        full, content = True, b""

        def writable(self) -> bool:
            return True

        def write(self, content: Any) -> int:
            if self.full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.content += bytes(content)
            return len(content)

    raw = Full()
    progress = telemetry.Progress(10, io.TextIOWrapper(io.BufferedWriter(raw)))
    progress.say("one")
    progress.update(10, {"memory_mb": 1.0}, 1.0, 1.0, 100.0)
    raw.full = False
    progress.say("two")
    assert raw.content.decode().splitlines() == ["one", "step 10/10  0:00 left  1 img/s  1 MB", "two"]
