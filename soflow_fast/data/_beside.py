"""Which vectors are those of a data set: a file that is given or lies in its folder, and the row of each sample."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import DataError, printable
from .conditions import BY_NAME, FLAG, IN_ORDER, Conditions, Vectors, read_vectors
from .dataset import Dataset


def file_beside(place: Path) -> Path | None:
    """The file of vectors in the folder of a data set; None: there is none. Raises DataError for two."""
    found = [place / name for name in (BY_NAME, IN_ORDER) if place.is_dir() and (place / name).is_file()]
    if len(found) > 1:
        raise DataError(f"--data {place}: holds {BY_NAME} and {IN_ORDER}: remove one, or name it by {FLAG}")
    return found[0] if found else None


def conditions_of(dataset: Dataset, place: str, given: str = "") -> Conditions | None:
    """The vectors of a data set at a path, from a file that is given or lies in its folder; None: there is no file.

    Raises DataError for a file that does not fit the samples, or that is not the one that came with them.
    """
    path = Path(given) if given else file_beside(Path(place)) if place else None
    if path is None:
        if dataset.contents.conditions:
            raise DataError(f"--data {place}: {IN_ORDER} is missing, which came with these latents")
        return None
    vectors = read_vectors(path)
    found = Conditions(vectors, _order(dataset, vectors))
    if not given:
        dataset.contents.left_out -= Counter([path.suffix])
        if dataset.contents.conditions not in ("", found.checksum):
            raise vectors.error("is not what came with these latents, its checksum differs")
    more = len(vectors.values) - len(found)
    if more:
        dataset.contents.notes.append(f"{more} vectors of {path.name} are of no sample")
    dataset.contents.notes.append(f"conditions: vectors of {found.size} numbers, {found.dtype}, from {path.name}")
    return found


def _order(dataset: Dataset, vectors: Vectors) -> np.ndarray | None:
    """The row of each sample; None: they are in order. Raises DataError."""
    names = dataset.names
    if vectors.names is None:
        if names is not None:
            raise vectors.error(f"has no names, and these images have: write {BY_NAME} with names and vectors")
        count, N = len(vectors.values), len(dataset)
        if dataset.numbers is not None and count == dataset.found:
            return dataset.numbers
        if count != N:
            raise vectors.error(f"holds {count} vectors, the data {N} samples")
        return None
    if names is None:
        raise vectors.error(f"has names, and these samples have none: write {IN_ORDER}, vectors in their order")
    return _rows_by_name(names, dataset.wrapper, vectors)


def _rows_by_name(names: Sequence[str], wrapper: str, vectors: Vectors) -> np.ndarray:
    assert vectors.names is not None
    rows: dict[str, int] = {}
    for row, name in enumerate(map(str, vectors.names)):
        if name in rows:
            raise vectors.error(f"names {printable(name)} twice")
        rows[name] = row
    inner = len(wrapper) + 1 if wrapper else 0  # the folder around all may be left out
    order = np.fromiter((rows.get(name, rows.get(name[inner:], -1)) for name in names), np.int64, len(names))
    missing = np.flatnonzero(order < 0)
    if len(missing):
        more = f" and {len(missing) - 1} more of {len(names)}" if len(missing) > 1 else ""
        raise vectors.error(f"holds no vector for {printable(names[int(missing[0])])}{more}")
    return order
