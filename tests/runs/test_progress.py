"""The output of a run, piece by piece; tests/commands/test_cli.py sees it all together."""

import errno
import io
import os
import re
from typing import Any

import pytest

from soflow_fast.runs.progress import Counter, Progress, duration

METRICS = {"fm_loss": 0.5, "sc_loss": -0.25, "sc_mse": 2.0, "memory_mb": 321.4, "lr": 1.0}


def progress_lines(steps: list[tuple[int, float]]) -> list[str]:
    stream = io.StringIO()
    progress = Progress(100, stream)
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
    Progress(100, stream).update(1, {"sc_mse": 2.0, "memory_mb": 1.0}, 0.0, 1.0, 0.0)
    assert stream.getvalue() == "step 1/100  ? left  mean q^2 2.000  1 img/s  1 MB\n"


class Screen(io.StringIO):
    """A terminal that does what Progress asks of one."""

    def __init__(self) -> None:
        super().__init__()
        self.lines, self.cursor_shown = [""], True

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        for part in re.findall(r"\x1b\[\??[0-9]*[a-zA-Z]|[\r\n]|[^\x1b\r\n]+", text):
            if part in ("\x1b[?25h", "\x1b[?25l"):
                self.cursor_shown = part.endswith("h")
            elif part in ("\r", "\x1b[2K"):
                self.lines[-1] = ""  # what follows a return to the line's beginning is always its erasure
            elif part == "\n":
                self.lines.append("")
            else:
                assert part.isprintable(), part
                self.lines[-1] += part
        return len(text)


@pytest.mark.parametrize("columns", [200, 80, 78, 40, 5])
def test_a_live_line_fits_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    screen = Screen()
    progress = Progress(100, screen)
    progress.say("training")
    progress.update(10, METRICS, 2.0, 123.4, 0.0)
    whole = "step 10/100  0:45 left  fm 0.500  sc -0.250  mean q^2 2.000  123 img/s  321 MB"
    shown = whole if len(whole) <= columns else whole[: columns - 1] + "\u2026"
    assert screen.lines == ["training", shown] and screen.cursor_shown
    progress.update(11, {"memory_mb": 1.0}, 2.0, 1.0, 0.0)
    assert screen.lines[1:] == ["step 11/100  0:44 left  1 img/s  1 MB"[:columns] if columns > 37 else screen.lines[1]]
    progress.say("a [bold]message[/] that is wider than " + "many " * 9 + "terminals")
    assert screen.lines[1].startswith("a [bold]message[/] that is wider") and screen.lines[1].endswith("terminals")
    assert screen.lines[2].startswith("step"[: columns - 1]) and len(screen.lines) == 3
    progress.close()
    progress.update(12, METRICS, 2.0, 1.0, 0.0)
    progress.close()
    assert screen.lines[3].startswith("step"[: columns - 1]) and screen.lines[4:] == [""] and screen.cursor_shown


def test_images_are_counted_with_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    screen = Screen()
    progress = Progress(1000, screen, since=0.0)
    progress.count(260, 74.0, 0.1)
    assert screen.lines == ["260/1000 images  0:10 left  74 img/s  [#####---------------]"]
    progress.count(1000, 74.0, 0.2)
    assert screen.lines == ["1000/1000 images  0:00 left  74 img/s  [####################]"]


def test_what_is_counted_quickly_gets_no_plain_line() -> None:
    for since, steps, said in (
        (100.0, [(5, 101.0), (10, 109.9)], []),
        (100.0, [(5, 110.1), (6, 111.0), (10, 112.0)], ["5/10", "10/10"]),
        (float("-inf"), [(5, 100.0), (6, 101.0), (10, 102.0)], ["5/10", "10/10"]),
    ):
        stream = io.StringIO()
        progress = Progress(10, stream, since=since)
        for done, now in steps:
            progress.count(done, 1.0, now)
        assert [line.split()[0] for line in stream.getvalue().splitlines()] == said, since


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_live_line_fits_whatever_the_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ellipsis that the encoding lacks would be printed as an escape of six characters, and wrap the line."""
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")

    class Narrow(Screen):
        @property
        def encoding(self) -> str:
            return encoding

        def write(self, text: str) -> int:
            return super().write(text.encode(encoding, "backslashreplace").decode(encoding))

    screen = Narrow()
    Progress(100, screen).update(10, METRICS, 2.0, 123.4, 0.0)
    whole = "step 10/100  0:45 left  fm 0.500  sc -0.250"
    assert screen.lines == [whole[:40] if encoding == "ascii" else whole[:39] + "\u2026"]


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    screen = Screen()
    progress = Progress(100, screen)
    progress.update(10, {"memory_mb": 1.0}, 2.0, 1.0, 0.0)
    progress.update(11, {"memory_mb": 1.0}, 2.0, 1.0, 0.0)
    assert screen.lines == ["step 10/100  0:45 left  1 img/s  1 MB", ""]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (754, "12:34"), (3600, "1:00:00"), (360_061, "100:01:01")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_reader_that_goes_away_does_not_end_the_run() -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    progress = Progress(10, Broken())
    progress.say("one")
    progress.update(10, {"memory_mb": 1.0}, 1.0, 1.0, 100.0)
    progress.close()


def test_output_that_is_refused_comes_later() -> None:
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
    progress = Progress(10, io.TextIOWrapper(io.BufferedWriter(raw)))
    progress.say("one")
    progress.update(10, {"memory_mb": 1.0}, 1.0, 1.0, 100.0)
    raw.full = False
    progress.say("two")
    assert raw.content.decode().splitlines() == ["one", "step 10/10  0:00 left  1 img/s  1 MB", "two"]


def test_a_counter_counts_on_a_terminal_from_the_first_to_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.0, 14.0, 100.0])
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    screen, plain = Screen(), io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    counter = Counter(lambda: next(clock))
    shown = []
    for done in (64, 128, 150):
        counter(done, 150)
        shown.append(screen.lines[0])
    assert shown == [
        *("64/150 images  ? left  0 img/s", "128/150 images  0:01 left  32 img/s"),
        "150/150 images  0:00 left  22 img/s",
    ]
    assert screen.lines == [shown[-1], ""] and screen.cursor_shown
    monkeypatch.setattr("sys.stderr", plain)
    counter(64, 150)
    assert plain.getvalue() == ""
