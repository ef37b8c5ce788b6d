"""Two records of one benchmark side by side: `python -m benchmarks.report --compare A B`."""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.report import record
from benchmarks.report.tables import markdown, number
from soflow_fast.errors import UserError

IDENTITY = (
    "case", "gpus", "parallel", "operation", "pass", "shape", "axis", "value", "kind", "r_end", "seed", "batch",
    "dtype", "recipe", "way",
)  # fmt: skip
"""The fields by which two rows are of the same thing. Precision is not among them: it is shown."""
NO_ENVIRONMENT = ("benchmark", "rows", "file", "date", "command")


class Incomparable(UserError):
    """Records that are not there, or have nothing in common: one line."""


def find(name: str, folder: Path) -> dict:
    """The record in a file, or of that name in `folder`, with or without .json. Raises Incomparable, or BadRecord."""
    try:
        path = next(path for path in (Path(name), folder / name, folder / f"{name}.json") if path.is_file())
    except (StopIteration, OSError, ValueError):  # a name may be too long, or hold a zero byte
        raise Incomparable(f"{name}: neither a file nor a record in {record.shown(folder)}") from None
    found = record.read(path)
    if "benchmark" not in found:
        raise Incomparable(f"{name}: is no record of a benchmark")
    return found


def compare(a: dict, b: dict) -> str:
    """Both records as Markdown: what differs in their environments, and each row's medians and their ratio.

    Raises Incomparable for records of different benchmarks, or without a row in common that has times.
    """
    kinds = [run.get("benchmark") for run in (a, b)]
    if kinds[0] != kinds[1]:
        raise Incomparable(f"{a['file']} is of {kinds[0]}, {b['file']} of {kinds[1]}")
    head, lines, alone = _trainings(a, b) if kinds[0] == "quality-for-time" else _times(a, b)
    left, right = (dict(_flatten({k: v for k, v in run.items() if k not in NO_ENVIRONMENT})) for run in (a, b))
    names = [name for name in dict.fromkeys([*left, *right]) if left.get(name) != right.get(name)]
    environment = [[name, str(a.get(name, "")), str(b.get(name, ""))] for name in ("date", "command")]
    environment += [[name, str(left.get(name, "")), str(right.get(name, ""))] for name in names]

    names_of_both = [a["file"], b["file"]]
    return "\n".join(
        [
            markdown(["", *names_of_both], 0, environment),
            "",
            markdown([head, *names_of_both, "second over first"], 3, lines),
            *(["", *alone] if alone else []),
        ]
    )


def _times(a: dict, b: dict) -> tuple[str, list[list[str]], list[str]]:
    """Head, lines and remarks for rows that are of the same thing: their medians."""
    mine, theirs = (_by_identity(run) for run in (a, b))
    lines = []
    for key in _common(a, mine, b, theirs):
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
    return "median ms", lines, alone


def _trainings(a: dict, b: dict) -> tuple[str, list[list[str]], list[str]]:
    """The same for benchmarks.quality_for_time: per method the means over its seeds, and what they are means over."""
    mine, theirs = (_by_method(run) for run in (a, b))
    common = _common(a, mine, b, theirs)
    lines = []
    for method in common:
        for what, first in mine[method][0].items():
            second = theirs[method][0][what]
            lines.append([f"{method}: {what}", number(first), number(second), f"{second / first:.2f}x"])
    over = []
    for run, rows in ((a, mine), (b, theirs)):
        each = dict.fromkeys(rows[method][1] for method in common)
        over += [f"{run['file']}: {'; '.join(each)}."]
    return "mean over the seeds", lines, over


def _common(a: dict, mine: dict, b: dict, theirs: dict) -> list:
    common = [key for key in mine if key in theirs]
    if not common:
        raise Incomparable(f"{a['file']} and {b['file']} have no row in common that has times")
    return common


def _by_method(run: dict) -> dict[str, tuple[dict[str, float], str]]:
    """The figures of each method, and the steps and seeds behind them."""
    found: dict[str, list[dict]] = {}
    for index, row in enumerate(run["rows"]):
        points = row.get("points")
        last = points[-1] if isinstance(points, list) and points and isinstance(points[-1], dict) else {}
        for name in ("step", "seconds", "frechet"):
            value = last.get(name)
            if not isinstance(value, (int, float)) or not record.LEAST <= value <= record.MOST:
                raise Incomparable(f"{run['file']}: row {index}: its last point needs {name}, a number above 0")
        if not all(isinstance(row.get(name), kind) for name, kind in (("method", str), ("seed", int))):
            raise Incomparable(f"{run['file']}: row {index}: needs a method and a seed")
        found.setdefault(row["method"], []).append(last | {"seed": row["seed"]})
    return {
        method: (
            {
                "ms per step": statistics.fmean(1e3 * last["seconds"] / last["step"] for last in each),
                "Frechet at the end": statistics.fmean(last["frechet"] for last in each),
            },
            f"{' and '.join(str(n) for n in sorted({last['step'] for last in each}))} steps, "
            f"seeds {' '.join(str(n) for n in sorted(last['seed'] for last in each))}",
        )
        for method, each in found.items()
    }


def _by_identity(run: dict) -> dict[tuple, dict]:
    """Rows that have times, by what they are of."""
    found = {}
    for index, row in enumerate(run["rows"]):
        for name in IDENTITY:
            if isinstance(row.get(name), (list, dict)):
                raise Incomparable(f"{run['file']}: row {index}: {name} must be text or a number")
        if _seconds(row):
            found[tuple((name, row[name]) for name in IDENTITY if name in row)] = row
    return found


def _seconds(row: dict) -> list[float]:
    value = row.get("seconds", [])
    return value if isinstance(value, list) else [value]


def _flatten(values: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, json.dumps(value) if isinstance(value, list) else value
