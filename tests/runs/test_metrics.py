"""The numbers of a run on disk: whole lines, whatever was refused or cut off, and TensorBoard, which may fail."""

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

from soflow_fast.runs import metrics
from soflow_fast.runs.metrics import MetricsLog, TensorBoard, lines_until


def steps(path: Path) -> list[int]:
    """The steps in a log, each line of it whole."""
    text = path.read_text()
    assert text.endswith("\n") or not text
    return [json.loads(line)["step"] for line in text.splitlines()]


def test_a_log_opened_again_drops_what_comes_after_its_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0, pytest.fail)
    for step in (2, 4, 6):
        log.write({"step": step, "loss": 0.5})
    path.write_text(path.read_text() + '{"step": 8, "lo')  # cut off by a kill
    log = MetricsLog(path, 4, pytest.fail)
    log.write({"step": 6, "loss": 0.25})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 2, "loss": 0.5},
        {"step": 4, "loss": 0.5},
        {"step": 6, "loss": 0.25},
    ]


@pytest.mark.parametrize(
    "junk", [b"\xff\xfe", b"\0" * 40, b"[" * 5000, b'{"step": ' + b"9" * 5000 + b"}", b"7", b"{}", b'{"step": 94}']
)
def test_a_damaged_line_goes_at_the_end_and_costs_no_other(junk: bytes) -> None:
    lines = b'{"step": 2}\n{"step": 4}\n'
    for end in (b"", b"\n"):
        assert lines_until(lines + junk + end, 9) == lines
        assert lines_until(junk + end, 9) == b""
    assert lines_until(junk + b"\n" + lines, 9) == junk + b"\n" + lines


@pytest.mark.parametrize("torn", [b'{"step": 6, "lo', b"\0" * 100, b"\xff"])
def test_a_last_line_that_was_cut_off_goes(torn: bytes) -> None:
    lines = b'{"step": 2}\n{"step": 4}\n'
    assert lines_until(lines + torn, 6) == lines
    assert lines_until(lines[:-1], 6) == lines, "only its end was lost"


def test_a_flipped_bit_in_the_log_costs_no_other_line() -> None:
    """Every bit of every byte: the other lines up to the step are kept as they were."""
    lines = [json.dumps({"step": k, "loss": k / 7}).encode() for k in range(2, 21, 2)]
    content = b"".join(line + b"\n" for line in lines)
    for place in range(len(content)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            parts = bytes(damaged).split(b"\n")
            left = lines_until(bytes(damaged), 14).split(b"\n")
            assert [line for line in lines[:7] if line in parts] == [line for line in left if line in lines[:7]]


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
def test_lines_that_the_disk_refuses_are_lost_and_later_ones_are_whole(
    number: int, truncates: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every number of bytes that may fit of three lines."""
    for room in range(3 * 12 + 1):
        disk, warnings, path = Disk(monkeypatch), [], tmp_path / f"{room}.jsonl"
        log = MetricsLog(path, 0, warnings.append)
        log.write({"step": 0})
        disk.room, disk.number, disk.truncates = room, number, truncates
        for step in range(1, 4):
            log.write({"step": step})
        fit = room // 12
        assert len(warnings) == (fit < 3)
        for warning in warnings:
            assert warning.startswith(f"{room}.jsonl from step {fit + 1} on not written: [Errno {number}]")
        disk.room, disk.truncates = 10**6, True
        log.write({"step": 4})
        assert steps(path) == [0, *range(1, fit + 1), 4]
        disk.room = 3
        log.write({"step": 5})
        assert len(warnings) == (fit < 3) + 1, "a new row of refusals has a warning of its own"
        MetricsLog(path, 9, pytest.fail)
        assert steps(path) == [0, *range(1, fit + 1), 4], "a start drops what was left of a refused line"


def test_a_quota_that_is_told_of_at_closing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NFS does: whether the line is there is not known."""
    disk, warnings, path = Disk(monkeypatch), [], tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0, warnings.append)
    disk.closes = False
    log.write({"step": 1})
    log.write({"step": 2})
    disk.closes = True
    log.write({"step": 3})
    assert steps(path) == [1, 2, 3] and len(warnings) == 1


def test_metrics_log_on_a_full_disk_keeps_whole_lines(mount: Callable[..., Path]) -> None:
    disk, warnings = mount("size=8k"), []
    path = disk / "metrics.jsonl"
    log = MetricsLog(path, 0, warnings.append)
    for step in range(1, 101):
        log.write({"step": step, "text": "x" * 100})
    assert len(warnings) == 1 and "No space left on device" in warnings[0]
    subprocess.run(["mount", "-o", "remount,size=64k", str(disk)], check=True)
    log.write({"step": 101})
    found = steps(path)
    assert found == [*range(1, len(found)), 101] and 10 < len(found) < 100


# TensorBoard


def read(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()


def test_tensorboard_has_numbers_and_grids(tmp_path: Path) -> None:
    threads, hook = threading.active_count(), threading.excepthook
    board = TensorBoard(tmp_path / "tensorboard", 3, pytest.fail)
    grid = torch.arange(24_000).to(torch.uint8).reshape(80, 100, 3)
    for step in range(4, 40):
        board.write({"step": step, "loss": step / 2, "lr": 0.5})
    board.image(grid, 39)
    board.flush()
    found = read(tmp_path / "tensorboard")
    board.close()
    assert threading.active_count() == threads and threading.excepthook == hook
    assert sorted(found.Tags()["scalars"]) == ["loss", "lr"]
    assert [(point.step, point.value) for point in found.Scalars("loss")] == [(k, k / 2) for k in range(4, 40)]
    (image,) = found.Images("samples")
    assert (image.step, image.width, image.height) == (39, 100, 80)
    with Image.open(io.BytesIO(image.encoded_image_string)) as png:
        assert png.tobytes() == grid.numpy().tobytes()


def test_tensorboard_shows_a_step_once_after_a_resume(tmp_path: Path) -> None:
    for first, last in ((0, 6), (3, 8)):
        board = TensorBoard(tmp_path / "tensorboard", first, pytest.fail)
        for step in range(first + 1, last + 1):
            board.write({"step": step, "loss": float(first)})
        board.close()
    assert [(point.step, point.value) for point in read(tmp_path / "tensorboard").Scalars("loss")] == [
        *((step, 0.0) for step in (1, 2, 3)),
        *((step, 3.0) for step in (4, 5, 6, 7, 8)),
    ]


@pytest.mark.parametrize("seconds", [0, 30], ids=["its thread", "flush"])
def test_a_tensorboard_that_the_disk_refuses_is_one_warning(
    seconds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The thread writes each record at once and dies of the full disk, or the run waits for the writing."""
    monkeypatch.setattr(metrics, "FLUSH_SECONDS", seconds)
    threads, hook, warnings = threading.active_count(), threading.excepthook, []
    board = TensorBoard(tmp_path / "tensorboard", 0, warnings.append)
    board.write({"step": 1, "loss": 1.0})
    board.flush()
    (file,) = (tmp_path / "tensorboard").iterdir()
    file.unlink()
    file.symlink_to("/dev/full")
    for step in range(2, 200):
        board.write({"step": step, "loss": 1.0})
    board.flush()
    board.image(torch.zeros(4, 4, 1, dtype=torch.uint8), 200)
    board.close()
    assert warnings == ["tensorboard not written from here on: [Errno 28] No space left on device"]
    assert capfd.readouterr().err == "" and threading.excepthook == hook
    for thread in threading.enumerate():
        thread.join(5) if "Async" in type(thread).__name__ else None
    assert threading.active_count() == threads


def test_a_tensorboard_that_cannot_be_begun_is_one_warning(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("no folder")
    warnings: list[str] = []
    board = TensorBoard(tmp_path / "tensorboard", 0, warnings.append)
    board.write({"step": 1, "loss": 1.0})
    board.close()
    assert len(warnings) == 1 and "tensorboard not written from here on" in warnings[0]
