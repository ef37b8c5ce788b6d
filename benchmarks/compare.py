"""Two records of one benchmark side by side: `python -m benchmarks.report --compare A B`."""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.tables import markdown, number

IDENTITY = (
    "case", "operation", "pass", "shape", "axis", "value", "kind", "r_end", "seed", "batch", "dtype", "recipe", "way",
)  # fmt: skip
"""What says that two rows are of the same thing. Precision is not among it: it is shown, as GPUs and CPUs differ."""
NO_ENVIRONMENT = ("benchmark", "rows", "file", "date", "command")


class Incomparable(Exception):
    """Records that are not there, cannot be read, or have nothing in common: one line."""


def find(name: str, folder: Path = record.RECORDS) -> dict:
    """The record in a file, or of that name in `folder`, with or without .json. Raises Incomparable."""
    for path in (Path(name), folder / name, folder / f"{name}.json"):
        if path.is_file():
            try:
                found = record.read(path)
            except (OSError, ValueError) as error:
                raise Incomparable(f"{name}: {error}") from None
            rows = found.get("rows")
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise Incomparable(f"{name}: is no record of a benchmark")
            return found
    raise Incomparable(f"{name}: neither a file nor a record in {record.shown(folder)}")


def compare(a: dict, b: dict) -> str:
    """Both records as Markdown: what differs in their environments, and each row's medians and their ratio.

    Raises Incomparable for records of different benchmarks, or without a row in common that has times.
    """
    kinds = [run.get("benchmark") for run in (a, b)]
    if kinds[0] != kinds[1]:
        raise Incomparable(f"{a['file']} is of {kinds[0]}, {b['file']} of {kinds[1]}")
    mine, theirs = (_by_identity(run["rows"]) for run in (a, b))
    common = [key for key in mine if key in theirs]
    if not common:
        raise Incomparable(f"{a['file']} and {b['file']} have no row in common that has times")

    left, right = (dict(_flatten({k: v for k, v in run.items() if k not in NO_ENVIRONMENT})) for run in (a, b))
    names = [name for name in dict.fromkeys([*left, *right]) if left.get(name) != right.get(name)]
    environment = [[name, str(a.get(name, "")), str(b.get(name, ""))] for name in ("date", "command")]
    environment += [[name, str(left.get(name, "")), str(right.get(name, ""))] for name in names]

    lines = []
    for key in common:
        medians = [statistics.median(_seconds(rows[key])) for rows in (mine, theirs)]
        named = [(name, str(value)) for name, value in key]
        # A case that names its batch has named it.
        what = ", ".join(
            v for name, v in named if name != "batch" or not any(f"batch {v}" in other for _, other in named)
        )
        precisions = {str(rows[key]["precision"]) for rows in (mine, theirs) if "precision" in rows[key]}
        what += f" ({' and '.join(sorted(precisions))})" if precisions else ""
        lines.append([what, *(number(1e3 * value) for value in medians), f"{medians[1] / medians[0]:.2f}x"])
    alone = [
        f"Only in {run['file']}: {sum(key not in others for key in own)} rows."
        for run, own, others in ((a, mine, theirs), (b, theirs, mine))
        if any(key not in others for key in own)
    ]
    return "\n".join(
        [
            markdown(["", a["file"], b["file"]], 0, environment),
            "",
            markdown(["median ms", a["file"], b["file"], "second over first"], 3, lines),
            *(["", *alone] if alone else []),
        ]
    )


def _by_identity(rows: list[dict]) -> dict[tuple, dict]:
    """Rows that have times, by what they are of."""
    return {tuple((name, row[name]) for name in IDENTITY if name in row): row for row in rows if _seconds(row)}


def _seconds(row: dict) -> list[float]:
    value = row.get("seconds")
    if isinstance(value, (int, float)):
        return [value]
    return value if isinstance(value, list) else []


def _flatten(values: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, json.dumps(value) if isinstance(value, list) else value
