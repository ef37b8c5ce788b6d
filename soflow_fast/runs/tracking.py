"""A run in Weights & Biases or Trackio, by a process of its own: the training neither waits for it nor ends with it."""

import base64
import importlib.util
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config.schema import Config, flatten
from ..errors import ConfigError, printable
from .images import png

TRACKING = "tracking.json"
"""The file of a run directory with the id of the run in each tracker."""
MOST_WAITING, MOST_GRIDS = 10_000, 4
"""Lines of numbers, and grids among them, that may wait for a tracker; those beyond are left out."""
MOST_SAID = 300
"""Characters of what a tracker said as it failed."""
CLOSE_SECONDS = 15.0
"""Seconds that the end of a run waits for its tracker."""


def check_installed(tracker: str) -> None:
    """Raise ConfigError if the package of a tracker, "none" for none, is not installed."""
    if tracker == "none":
        return
    try:
        found = importlib.util.find_spec(tracker)
    except (ImportError, ValueError):
        found = None
    if found is None or found.origin is None:  # a folder `wandb` of a run is no package, but is found
        raise ConfigError(f"--track {tracker}: needs the package {tracker} (pip install {tracker})")


class Tracker:
    """Hands numbers and grids to a tracker, in order.

    Every call returns at once: a thread writes what it is given to the process (`_tracker`), for which it waits in
    the place of the training. The first failure is told to `warn` at the next call, and nothing is tracked from then
    on. What waits is bounded.
    """

    def __init__(self, config: Config, run_dir: Path, resumed: bool, warn: Callable[[str], None]) -> None:
        """resumed: whether the run goes on, so that the run in the tracker does as well."""
        self.name, self._warn = config.run.track, warn
        self._waiting: queue.SimpleQueue[tuple[int, Any] | None] = queue.SimpleQueue()
        self._grids = threading.Semaphore(MOST_GRIDS)
        self._fault, self._told, self._left_out = "", False, False
        self._first = {
            "tracker": self.name,
            "name": run_dir.resolve().name,
            "folder": str(run_dir.resolve()),
            "file": str(run_dir.resolve() / TRACKING),
            "resumed": resumed,
            "config": flatten(config),
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._work, name="soflow-tracker", daemon=True)
        self._thread.start()

    def write(self, entry: Mapping[str, Any]) -> None:
        """Each number of `entry` under its name, at its step."""
        self._put(entry["step"], {name: value for name, value in entry.items() if name != "step"})

    def image(self, grid: Tensor, step: int) -> None:
        """A uint8 grid [H, W, C] of samples."""
        if self._fault or self._grids.acquire(blocking=False):
            self._put(step, grid)
        else:
            self._too_slow()

    def flush(self) -> None:
        """Nothing: what waits is written in time, and a checkpoint does not wait for a network."""
        self._tell()

    def close(self) -> None:
        """Let the process end by itself, for `CLOSE_SECONDS` at most."""
        self._waiting.put(None)
        self._thread.join(CLOSE_SECONDS)
        self._tell()
        if self._thread.is_alive():
            self._warn(f"{self.name} has not taken all within {CLOSE_SECONDS:g} s of the end")
            if self._process is not None:
                self._process.kill()
                self._thread.join(CLOSE_SECONDS)

    def _put(self, step: int, content: Any) -> None:
        self._tell()
        if self._fault:
            return
        if self._waiting.qsize() < MOST_WAITING:
            self._waiting.put((step, content))
        else:
            if isinstance(content, Tensor):
                self._grids.release()
            self._too_slow()

    def _too_slow(self) -> None:
        if not self._left_out:
            self._warn(f"{self.name} is slower than the run: some of its numbers or grids are left out there")
        self._left_out = True

    def _tell(self) -> None:
        """Tell of a failure, in the thread of the training."""
        if self._fault and not self._told:
            self._told = True
            self._warn(f"{self.name} gets nothing from here on: {self._fault}")

    def _work(self) -> None:
        try:
            with tempfile.TemporaryFile() as output:
                self._hand_over(output)
        except OSError as error:  # no process, or no room for what it says
            self._fault = self._fault or str(error)

    def _hand_over(self, output: Any) -> None:
        """Start the process and write to it until the end. What it prints goes to the file `output`."""
        path = os.pathsep.join(entry for entry in sys.path if entry)
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}._tracker"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for the training, which then says that this ends
        )
        stdin = self._process.stdin
        assert stdin is not None
        with suppress(BrokenPipeError), stdin:
            _write_line(stdin, self._first)
            while (item := self._waiting.get()) is not None:
                step, content = item
                if isinstance(content, Tensor):
                    content = {"png": base64.b64encode(png(content)).decode()}
                    self._grids.release()
                else:
                    content = {"values": content}
                _write_line(stdin, {"step": step, **content})
        if self._process.wait():
            output.seek(0)
            lines = output.read()[-4096:].decode(errors="replace").strip().splitlines()
            said = printable(lines[-1].strip())[:MOST_SAID] if lines else ""
            self._fault = said or f"it ended with exit code {self._process.returncode}"


def _write_line(file: Any, order: Mapping[str, Any]) -> None:
    file.write((json.dumps(dict(order)) + "\n").encode())
    file.flush()
