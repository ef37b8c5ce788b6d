"""What a run directory shows, read without trust: it may be written to meanwhile, damaged, or of another version."""

import contextlib
import fcntl
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import ConfigError, printable
from ...files import LOCK, TEXT, read_file
from .. import source_code
from .curves import Curve, curves
from .pictures import MOST_FILE, shown

MOST_LOG = 2**29
"""Bytes of metrics.jsonl that are read."""
MOST_TEXT = 200
"""Characters of a text of evaluation.json."""
MOST_GRIDS, MOST_GRID_BYTES = 100, 16 * 2**20
"""Sample grids of a run in a page, and their bytes together: of more, some are shown, evenly over the training."""


@dataclass(frozen=True)
class Grid:
    """A grid of samples."""

    step: int
    uri: str
    """The image as a data URI."""


@dataclass
class Run:
    """What a page shows of a run."""

    folder: Path
    name: str
    status: str
    """"training now", "finished" or "stopped"."""
    step: int
    steps: int
    """The last step that is known, and how many it is to have; 0: not known."""
    config: dict[str, Any]
    """Fields of config.json by their full names."""
    code: dict[str, Any]
    curves: dict[str, Curve]
    """By the name in metrics.jsonl."""
    seconds: float
    grids: list[Grid]
    figures: list[tuple[str, float | str]]
    """Of evaluation.json, and what stands beside them, by name."""
    notes: list[str] = field(default_factory=list)
    """What is not shown, and why, each a sentence."""


def read_run(folder: Path) -> Run:
    """Read a run directory. Raises ConfigError if it is none; whatever else is wrong with it becomes a note."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such run directory")
    config = flattened(_json(folder / "config.json"))
    if not config and not (folder / "metrics.jsonl").exists():
        raise ConfigError(f"{folder}: is no run directory (it has neither config.json nor metrics.jsonl)")
    notes: list[str] = []
    entries, damaged = read_log(folder / "metrics.jsonl")
    if not entries:
        notes.append("There are no metrics yet: metrics.jsonl is missing or empty.")
    if damaged:
        lines = "1 line of metrics.jsonl is" if damaged == 1 else f"{damaged} lines of metrics.jsonl are"
        notes.append(f"{lines} damaged and left out.")
    found, seconds = curves(entries)
    steps, step = int(_number(config.get("steps"))), entries[-1]["step"] if entries else 0
    ended = not steps or step >= steps
    grids = read_grids(folder / "samples", step if ended else None, notes)
    training = is_held(folder)
    status = "training now" if training else "finished" if steps and step >= steps else "stopped"
    figures = [
        (name.removeprefix("nfe."), value[:MOST_TEXT] if isinstance(value, str) else value)
        for name, value in flattened(_json(folder / "evaluation.json")).items()
        if isinstance(value, str) or (type(value) in (int, float) and abs(value) < math.inf)
    ]
    code = source_code.read(folder)
    name = printable(folder.resolve().name)
    return Run(folder, name, status, step, steps, config, code, found, seconds, grids, figures, notes)


def told_apart(runs: list[Run]) -> None:
    """Give runs whose folders are of one name longer ones."""
    for depth in range(2, 9):
        names = [run.name for run in runs]
        for run in runs:
            if names.count(run.name) > 1:
                run.name = printable("/".join(run.folder.resolve().parts[-depth:]))
    for number, run in enumerate(runs):
        if any(run.name == other.name for other in runs[:number]):
            run.name = f"{run.name} ({number + 1})"


def read_log(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of metrics.jsonl that are objects with a step, in order, one for each step; how many are damaged.

    A last line that is cut off is no damage: the run is writing it."""
    try:
        content = read_file(path, MOST_LOG)
    except OSError:
        return [], 0
    lines = content.split(b"\n")
    entries: dict[int, dict[str, Any]] = {}
    damaged = 0
    for number, line in enumerate(lines):
        try:
            entry = json.loads(line)
            step = entry["step"]
        except (ValueError, KeyError, TypeError, RecursionError):
            damaged += bool(line.strip()) and number < len(lines) - 1
            continue
        if type(step) is int and 0 <= step < 2**53:
            entries[step] = {**entries.get(step, {}), **entry}
        else:
            damaged += 1
    return [entries[step] for step in sorted(entries)], damaged


def read_grids(folder: Path, last: int | None, notes: list[str]) -> list[Grid]:
    """The grids in a folder of samples. last: the step of final.png; None: that is of an earlier end of the run."""
    found: list[tuple[int, Path, int]] = []
    latents = False
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir()):
            match = re.fullmatch(r"(?:step-(\d{1,12})|final)\.(png|npy)", path.name)
            if match and match[2] == "npy":
                latents = True
            elif match and (match[1] or last is not None):
                with contextlib.suppress(OSError):
                    found.append((int(match[1] or last or 0), path, path.stat().st_size))
    found.sort(key=lambda item: (item[0], item[1].name.startswith("final")))
    if not found:
        notes.append(
            "Its samples are latents, in .npy: the VAE that makes images of them was not there."
            if latents
            else "There are no sample grids yet."
        )
        return []
    usable = [item for item in found if item[2] <= MOST_FILE]
    chosen = thinned(usable, MOST_GRIDS)
    grids = [Grid(step, uri) for step, path, _ in chosen if (uri := shown(path)) is not None]
    total, most = sum(len(grid.uri) for grid in grids), max((len(grid.uri) for grid in grids), default=1)
    if total > MOST_GRID_BYTES:
        grids = thinned(grids, max(2, MOST_GRID_BYTES // most))
    if len(grids) < len(found):
        notes.append(f"{len(grids)} of {len(found)} sample grids are shown.")
    return grids


def thinned(items: list[Any], most: int) -> list[Any]:
    """At most `most` items, evenly, with the first and the last."""
    if len(items) <= most:
        return items
    return [items[round(k * (len(items) - 1) / (most - 1))] for k in range(most)]


def is_held(folder: Path) -> bool:
    """Whether a process trains in a run directory now, as its lock says."""
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(handle, fcntl.LOCK_UN)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(handle)
    return False


def flattened(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested objects of JSON as {"objective.eps": 0.01, ...}, a few levels deep."""
    if not isinstance(values, dict) or prefix.count(".") > 4:
        return {}
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flattened(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _json(path: Path) -> Any:
    """The content of a JSON file; None: it is not there or is not JSON."""
    try:
        return json.loads(read_file(path, TEXT))
    except (OSError, ValueError, RecursionError):
        return None


def _number(value: Any) -> float:
    return float(value) if type(value) in (int, float) and 0 <= value < 2**53 else 0.0
