"""Demonstrations in LeRobot's parquet format, versions 2.0, 2.1 and 3.0, read by pyarrow (extra `policy`).

A folder has meta/info.json, which names the features, and data/chunk-000/*.parquet with a row for each frame: a file is
an episode in version 2, and as many as fit in version 3. Images and videos are not read.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import ConfigError, DataError, printable
from ...files import read_file
from .episodes import Episodes

VERSIONS = ("v2.0", "v2.1", "v3.0")
OBSERVATIONS = ("observation.state", "observation.environment_state")
"""The features that are an observation, one after the other, of those that a data set has. Others are left out."""
ACTION = "action"
PLACE = ("episode_index", "frame_index")
MOST_BYTES = 2**26
"""Of info.json."""


def read_lerobot(folder: Path) -> Episodes:
    """All episodes of a data set. Raises DataError for one that is damaged or has no vectors, ConfigError without
    pyarrow."""
    where = f"--data {folder}"
    info = _info(folder, where)
    observed = [name for name in OBSERVATIONS if name in info["features"]]
    if not observed or ACTION not in info["features"]:
        missing = " or ".join(OBSERVATIONS) if not observed else ACTION
        raise DataError(f"{where}: has no {missing} among its features; images alone are not learned from")
    files = sorted(folder.glob("data/*/*.parquet"))
    if not files:
        raise DataError(f"{where}: holds no data/*/*.parquet")
    parts = [_columns(file, [*observed, ACTION, *PLACE], info["features"]) for file in files]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    frames = len(columns[ACTION])
    if frames != info.get("total_frames", frames) or not frames:
        raise DataError(f"{where}: holds {frames} frames, meta/info.json says {info.get('total_frames')}")
    order = np.lexsort([columns[name][:, 0] for name in reversed(PLACE)])
    episode, frame = (columns[name][order, 0] for name in PLACE)
    steps = np.diff(frame) == np.where(np.diff(episode) == 0, 1, -frame[:-1])  # on by one, or to the first of the next
    if frame[0] != 0 or not steps.all():
        k = 0 if frame[0] != 0 else int(np.flatnonzero(~steps)[0]) + 1
        place = f"frame {frame[k]} of episode {episode[k]}"
        raise DataError(f"{where}: {place} does not follow the frame before it: one is missing, or there twice")
    last = np.append(np.flatnonzero(np.diff(episode)), frames - 1)
    observations = np.concatenate([columns[name] for name in observed], 1)[order]
    actions, digest = columns[ACTION][order], hashlib.sha256()
    for values in (observations, actions, episode):
        digest.update(np.ascontiguousarray(values).data)
    return Episodes(
        torch.from_numpy(observations),
        torch.from_numpy(actions),
        torch.from_numpy(last[np.searchsorted(last, np.arange(frames))]),
        digest.hexdigest(),
        f"{len(last)} episodes of a LeRobot data set ({info['codebase_version']})",
    )


def _info(folder: Path, where: str) -> dict[str, Any]:
    try:
        values = json.loads(read_file(folder / "meta" / "info.json", MOST_BYTES, follow=True))
    except OSError as error:
        raise DataError(f"{where}: meta/info.json: {error.strerror}; is this a LeRobot data set?") from None
    except (ValueError, RecursionError):
        raise DataError(f"{where}: meta/info.json is no JSON") from None
    if not isinstance(values, dict) or not isinstance(values.get("features"), dict):
        raise DataError(f"{where}: meta/info.json names no features")
    version = values.get("codebase_version")
    if version not in VERSIONS:
        raise DataError(f"{where}: is of LeRobot's version {version!r:.40}; read are {', '.join(VERSIONS)}")
    return values


def _columns(file: Path, names: list[str], features: dict[str, Any]) -> dict[str, np.ndarray]:
    """Columns of a file, [rows, numbers] each: float32, those of `PLACE` int64."""
    try:
        import pyarrow as arrow  # pyright: ignore[reportMissingImports]
        from pyarrow import parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError(f"--data {file}: is read by pyarrow: pip install 'soflow-fast[policy]'") from None
    try:
        table = parquet.read_table(file, columns=names)
    except (OSError, arrow.ArrowException) as error:
        raise DataError(f"--data {file}: cannot be read ({printable(str(error).splitlines()[0])})") from None
    found = {}
    for name in names:
        if name not in table.column_names:
            raise DataError(f"--data {file}: has no column {name}")
        column: Any = table.column(name).combine_chunks()
        rows, numbers, alike = len(column), column, True
        if not rows:
            found[name] = np.empty((0, _size(features.get(name))), np.float32)
            continue
        if isinstance(column, (arrow.ListArray, arrow.LargeListArray, arrow.FixedSizeListArray)):
            numbers: Any = column.flatten()
            lengths = column.value_lengths() if hasattr(column, "value_lengths") else None
            alike = lengths is None or len(lengths.unique()) == 1
        numeric = arrow.types.is_integer(numbers.type) or arrow.types.is_floating(numbers.type)
        if not numeric or not alike or numbers.null_count or column.null_count:
            raise DataError(f"--data {file}: column {name} is not a number, or as many in each row")
        dtype = np.int64 if name in PLACE else np.float32
        if name in PLACE and not arrow.types.is_integer(numbers.type):
            raise DataError(f"--data {file}: column {name} is not of whole numbers")
        with np.errstate(over="ignore"):  # which are told below
            values = numbers.to_numpy(zero_copy_only=False).astype(dtype).reshape(rows, -1)
        if name not in PLACE and values.shape[1] != _size(features[name]):
            what = f"{values.shape[1]} numbers in a row, meta/info.json says {_size(features[name])}"
            raise DataError(f"--data {file}: column {name} has {what}")
        if not np.isfinite(values).all():
            raise DataError(f"--data {file}: column {name} holds a number that is not finite")
        found[name] = values
    return found


def _size(feature: Any) -> int:
    """The numbers in a value of a feature, as info.json describes it; 1 where it does not."""
    shape = feature.get("shape") if isinstance(feature, dict) else None
    whole = isinstance(shape, list) and all(type(side) is int and side > 0 for side in shape)
    return math.prod(shape) if whole and shape else 1
