"""The process beside a run that hands its numbers and grids to a tracker: `python -m soflow_fast.runs._tracker`.

It reads orders from stdin, a JSON object each line, until that ends (`tracking.Tracker` writes them). Whatever the
package of the tracker does, prompt, print, wait for a network or die, happens here and not where the training is. An
error is a traceback on stderr and exit code 1.
"""

import base64
import importlib
import io
import json
import os
import secrets
import sys
from pathlib import Path
from typing import Any

from ..files import TEXT, read_file, write_file

PROJECT = "soflow-fast"


def main() -> None:
    """Follow the orders of stdin, the first of which says what is tracked where."""
    first = json.loads(sys.stdin.readline())
    tracked = (_Wandb if first["tracker"] == "wandb" else _Trackio)(first)
    for line in sys.stdin:
        order = json.loads(line)
        if order["step"] <= tracked.known:
            continue  # a run that goes on from its last checkpoint makes these steps again, with the same numbers
        if "png" in order:
            tracked.image(base64.b64decode(order["png"]), order["step"])
        else:
            tracked.numbers(order["values"], order["step"])
        tracked.keep(order["step"])
    tracked.finish()


class _Tracked:
    """What is kept of a tracked run with it: the id by which a later start goes on, and the last step that it has."""

    def __init__(self, first: dict[str, Any]) -> None:
        self._path, self._tracker = Path(first["file"]), first["tracker"]
        self._records: dict[str, Any] = {}
        if first["resumed"] and self._path.exists():
            self._records = json.loads(read_file(self._path, TEXT))
        known = self._records.get(self._tracker, {})
        self.id, self.known = known.get("id") or secrets.token_hex(4), known.get("step", 0)
        self.keep(self.known)

    def keep(self, step: int) -> None:
        """Remember the id and that all is tracked until `step`."""
        self._records[self._tracker] = {"id": self.id, "step": step}
        write_file(self._path, (json.dumps(self._records) + "\n").encode(), synced=False)


class _Wandb(_Tracked):
    """Weights & Biases. Its own environment variables hold: WANDB_PROJECT, WANDB_MODE=offline and others."""

    def __init__(self, first: dict[str, Any]) -> None:
        super().__init__(first)
        self._package = importlib.import_module("wandb")
        self._run = self._package.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            id=self.id,
            name=first["name"],
            resume="allow",
            dir=first["folder"],
            config=first["config"],
            settings=self._package.Settings(console="off", silent=True),
        )

    def numbers(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def image(self, png: bytes, step: int) -> None:
        self._run.log({"samples": self._package.Image(_opened(png))}, step=step)

    def finish(self) -> None:
        self._run.finish()


class _Trackio(_Tracked):
    """Trackio, on this machine or where its environment variables say: TRACKIO_SPACE_ID, TRACKIO_DIR and others."""

    def __init__(self, first: dict[str, Any]) -> None:
        super().__init__(first)
        self._package = importlib.import_module("trackio")
        self._package.init(  # it finds a run again by its name
            project=os.environ.get("TRACKIO_PROJECT") or PROJECT,
            name=f"{first['name']}-{self.id}",
            resume="allow",
            config=first["config"],
            embed=False,
        )

    def numbers(self, values: dict[str, float], step: int) -> None:
        self._package.log(values, step=step)

    def image(self, png: bytes, step: int) -> None:
        self._package.log({"samples": self._package.Image(_opened(png))}, step=step)

    def finish(self) -> None:
        self._package.finish()


def _opened(png: bytes) -> Any:
    from PIL import Image

    image = Image.open(io.BytesIO(png))
    image.load()
    return image


if __name__ == "__main__":
    main()
