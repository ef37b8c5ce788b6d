"""The check of the files that a manifest names: size, SHA-256 and numbers, once for each file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import DataError
from ...files import cache_folder, read_file, sha256, write_file
from .layout import Layout, damage
from .manifest import LARGEST, Shard, file_name

REMEMBERED = 20_000
"""Files whose check is remembered."""
CHECK = 2
"""Grows when more is checked: what was remembered before is then checked again."""
ROWS_AT_A_TIME = 1024


def verify(folder: Path, layout: Layout, shards: list[Shard], say: Callable[[str], None]) -> None:
    """Raise DataError that names the first file of a shard that is missing, damaged or holds no latents."""
    found = first_wrong(folder, layout, shards, say)
    if found is not None:
        raise found[1]


def first_wrong(
    folder: Path, layout: Layout, shards: list[Shard], say: Callable[[str], None]
) -> tuple[int, DataError] | None:
    """The number of the first shard of which something is wrong, and what; None: nothing is.

    A file that was right once is not read again as long as path, size and time of change stay the same: the user's
    cache folder remembers them.
    """
    memory = cache_folder() / "checked.json"
    known, news, found = _remembered(memory), {}, None
    files = [(number, kind, file) for number, shard in enumerate(shards) for kind, file in shard.files.items()]
    for done, (number, kind, wanted) in enumerate(files):
        path = folder / file_name(kind, number)
        try:
            status = path.stat()
            if status.st_size != wanted.bytes:
                raise DataError(f"--data {folder}: {path.name} has {status.st_size} bytes, not {wanted.bytes}")
            place, mark = str(path.resolve()), [status.st_size, status.st_mtime_ns, wanted.sha256, CHECK]
            if known.get(place) == mark:
                continue
            if not news:
                say(f"checking {len(files)} files of {folder}, once")
            if sha256(path) != wanted.sha256:
                raise DataError(f"--data {folder}: {path.name} is damaged, its SHA-256 is not the manifest's")
            if kind != "labels":
                _check_numbers(folder, path.name, layout, shards[number].count)
            news[place] = mark
            if done % 50 == 49:
                say(f"{done + 1} of {len(files)} files checked")
        except DataError as error:
            found = number, error
            break
        except OSError as error:
            found = number, DataError(f"--data {folder}: {path.name}: {error.strerror or error}")
            break
    if news:
        _remember(memory, known, news)
    return found


def mapped(folder: Path, name: str, layout: Layout, count: int) -> np.ndarray:
    """A shard, float16 [n, 2C, H, W] or [n, C, H, W]; copied on writing, since torch knows no tensor that cannot be
    written. Raises DataError."""
    with damage(folder, name):
        found = np.load(folder / name, mmap_mode="c", allow_pickle=False)
    shape = (count, *layout.row())
    if found.shape != shape or found.dtype != np.float16:
        raise DataError(f"--data {folder}: {name} is {found.dtype} {found.shape}, not float16 {shape}")
    return found


def _check_numbers(folder: Path, name: str, layout: Layout, count: int) -> None:
    """Raise DataError that names a latent which is not finite or has a negative std."""
    shard = torch.from_numpy(mapped(folder, name, layout, count))
    for at in range(0, count, ROWS_AT_A_TIME):
        rows = shard[at : at + ROWS_AT_A_TIME]
        least = rows[:, layout.channels :].min() if layout.std else torch.tensor(0.0)
        if not (torch.isfinite(torch.stack(rows.aminmax())).all() and least >= 0):
            finite = torch.isfinite(rows).flatten(1).all(1)
            wrong = ~finite | (rows[:, layout.channels :] < 0).flatten(1).any(1)
            row = int(wrong.nonzero()[0])
            what = "has a negative std" if finite[row] else "is not finite"
            raise DataError(f"--data {folder}: {name}: latent {row} of it {what}")


def _remembered(memory: Path) -> dict[str, Any]:
    try:
        values = json.loads(read_file(memory, LARGEST))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _remember(memory: Path, known: dict[str, Any], news: dict[str, Any]) -> None:
    """Put what was checked into a file, if it can be written; else the next start checks again."""
    kept = dict([*(item for item in known.items() if item[0] not in news), *news.items()][-REMEMBERED:])
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_file(memory, json.dumps(kept).encode(), synced=False)
    except OSError:
        pass
