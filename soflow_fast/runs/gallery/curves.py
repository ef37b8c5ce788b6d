"""Curves from the lines of metrics.jsonl: thinned, with what is not finite counted and kept out."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

MOST_POINTS = 500
"""Points of a curve in a page. Of more, each stands for a stretch of steps: its mean, lowest and highest value."""


@dataclass(frozen=True)
class Curve:
    """A number over the training."""

    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]
    """Of each point; the three are one where nothing was thinned."""
    not_finite: list[int]
    """Steps, at most `MOST_POINTS` of them, at which it was NaN or infinite."""


def curves(entries: list[dict[str, Any]]) -> tuple[dict[str, Curve], float]:
    """The curves of a log by name, and the seconds of training in all.

    "seconds" count from the start of a process: the curve is of all starts together.
    """
    columns: dict[str, tuple[list[int], list[float]]] = {}
    before = elapsed = 0.0
    for entry in entries:
        for name, value in entry.items():
            if name == "step" or type(value) not in (int, float):
                continue
            try:
                value = float(value)
            except OverflowError:
                value = math.inf
            if name == "seconds":
                if not math.isfinite(value):
                    continue
                elapsed += value - before if value >= before else value
                before, value = value, elapsed
            steps, values = columns.setdefault(str(name), ([], []))
            steps.append(entry["step"])
            values.append(value)
    return {name: curve(*column) for name, column in columns.items()}, elapsed


def curve(steps: list[int], values: list[float]) -> Curve:
    """The curve through values at rising steps."""
    finite = [(step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
    wrong = [step for step, value in zip(steps, values, strict=True) if not math.isfinite(value)]
    count = min(len(finite), MOST_POINTS)
    edges = [k * len(finite) // count for k in range(count + 1)] if count else []
    parts = [finite[a:b] for a, b in pairwise(edges)]
    return Curve(
        steps=[part[-1][0] for part in parts],
        mean=[math.fsum(value / len(part) for _, value in part) for part in parts],
        low=[min(value for _, value in part) for part in parts],
        high=[max(value for _, value in part) for part in parts],
        not_finite=wrong[:MOST_POINTS],
    )
