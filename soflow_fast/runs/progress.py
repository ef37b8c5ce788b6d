"""The output of a run: a live line on a terminal, a plain line now and then elsewhere, and messages."""

import errno
import io
import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from ..errors import printable
from .ranks.notes import Notes

PLAIN_LINE_EVERY = 10.0
"""Seconds between progress lines where the output is not a terminal."""
BAR = 20
"""Characters of a bar."""
GONE = (errno.EPIPE, errno.EIO, errno.EBADF)
"""Errors of a reader that went away, of a terminal that was closed, and of a closed file."""
LABELS = {"fm_loss": "fm", "sc_loss": "sc", "sc_mse": "mean q^2"}
MEANFLOW_LABELS = {"fm_loss": "fm", "sc_loss": "mf", "sc_mse": "mean error^2"}


class Progress:
    """The output of a run of `total` steps. Whatever becomes of the stream, it does not end the run.

    A stream that went away is left alone from then on. What a full disk refuses is lost, or comes with a later line.
    Of several ranks only rank 0 prints; the warnings of others go to their `notes`. `at_work` is called with all that
    is to be printed, on each of them. `labels`: what the metrics that it shows are called. `since`: seconds of the
    clock; what is counted within PLAIN_LINE_EVERY of it gets no plain line.
    """

    def __init__(
        self,
        total: int,
        stream: TextIO | None = None,
        notes: Notes | None = None,
        at_work: Callable[[], None] = lambda: None,
        labels: Mapping[str, str] = LABELS,
        since: float = float("-inf"),
    ) -> None:
        self.total, self._at_work, self._labels = total, at_work, labels
        self._notes = notes if notes and notes.rank else None
        known: TextIO | None = stream or sys.stdout  # None where it was closed before Python began
        self._gone = known is None or getattr(known, "closed", False) or self._notes is not None
        self._stream = known or io.StringIO()
        self._console = _Console(file=self._stream, soft_wrap=True, markup=False, highlight=False, emoji=False)
        self._on_terminal = not self._gone and self._stream.isatty() and not self._console.is_dumb_terminal
        self._live: Live | None = None
        self._last = self._since = since

    def update(self, step: int, metrics: Mapping[str, float], rate: float, images: float, now: float) -> None:
        """Show step `step` at `now` seconds: `metrics`, `rate` steps/s and `images` images/s."""
        self._at_work()
        if not self._on_terminal and now - self._last < PLAIN_LINE_EVERY and step < self.total:
            return
        self._last = now
        left = (self.total - step) / rate if rate else float("inf")
        parts = [f"step {step}/{self.total}", f"{duration(left)} left"]
        parts += [f"{label} {metrics[name]:.3f}" for name, label in self._labels.items() if name in metrics]
        parts += [f"{images:.0f} img/s", f"{metrics['memory_mb']:.0f} MB"]
        self._show_line("  ".join(parts))

    def count(self, done: int, rate: float, now: float) -> None:
        """Show that `done` of the total are done at `now` seconds, `rate` a second, where they are images."""
        self._at_work()
        quiet = done < self.total or self._last == self._since
        if not self._on_terminal and now - self._last < PLAIN_LINE_EVERY and quiet:
            return
        self._last = now
        left = (self.total - done) / rate if rate else float("inf")
        filled = BAR * done // self.total
        bar = f"  [{'#' * filled}{'-' * (BAR - filled)}]" if self._on_terminal else ""  # last: a narrow one cuts it off
        self._show_line(f"{done}/{self.total} images  {duration(left)} left  {rate:.0f} img/s{bar}")

    def _show_line(self, line: str) -> None:
        self._show(lambda: self._show_live(line) if self._on_terminal else self._print(line))

    def say(self, text: str) -> None:
        """Print a line of its own, above the live line. Control sequences in it are made visible."""
        self._at_work()
        self._show(lambda: self._print(printable(text)))

    def warn(self, text: str) -> None:
        """Print a warning."""
        if self._notes:
            self._notes.note(f"warning: {text}")
        self.say(f"warning: {text}")

    def close(self) -> None:
        """End the live line, so that what follows stands on a line of its own."""
        live, self._live = self._live, None
        if live:
            self._show(live.stop)

    def _show_live(self, line: str) -> None:
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
            self._live.start()
            self._console.show_cursor()  # `Live` hides it, and a process that is killed could not show it again
        cut = "ellipsis" if _encodable("\u2026", self._stream) else "crop"
        self._live.update(Text(line, no_wrap=True, overflow=cut), refresh=True)

    def _print(self, line: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        line = line.encode(encoding, "backslashreplace").decode(encoding)
        if self._live:
            self._console.print(Text(line))
        else:
            self._stream.write(line + "\n")
            self._stream.flush()

    def _show(self, act: Callable[[], None]) -> None:
        """Write to the stream, if it is still there."""
        if self._gone:
            return
        try:
            act()
        except ValueError:  # closed meanwhile
            self._gone = True
        except OSError as error:
            # Other errors are those of a full disk, in which a later line may find room.
            self._gone = error.errno in GONE or isinstance(error, BrokenPipeError)


class Counter:
    """A count of images on stderr while they are measured, if that is a terminal: called with how many are done, of how
    many, it begins with the first and ends with the last of them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._progress: Progress | None = None

    def __call__(self, done: int, total: int) -> None:
        """Show it."""
        now = self._clock()
        if self._progress is None:
            if sys.stderr is None or not sys.stderr.isatty():
                return
            self._progress, self._began, self._first = Progress(total, sys.stderr), now, done
        passed = now - self._began
        self._progress.count(done, (done - self._first) / passed if passed else 0, now)
        if done >= total:
            self._progress.close()
            self._progress = None


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave the error to `Progress`: rich would exit."""
        raise  # rich calls this while it handles the error


def _encodable(text: str, stream: TextIO) -> bool:
    try:
        text.encode(getattr(stream, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def duration(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    if seconds == float("inf"):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
