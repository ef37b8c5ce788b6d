"""The page: one HTML file with everything in it, which loads nothing and runs from a disk."""

import html
import json
import math
from importlib import resources
from typing import Any

from ...version import __version__
from .curves import Curve
from .reading import Run
from .ways import Ways

GENERATOR = f"soflow-fast {__version__} gallery"
DIGITS = 6
"""Significant digits of a number of a curve."""


def page(runs: list[Run], drawn: list[Ways | None], made: str) -> str:
    """The page of some runs, with the ways of each where they could be drawn. made: when, in words."""
    title = " and ".join(run.name for run in runs) if len(runs) < 3 else f"{len(runs)} runs"
    data = {
        "made": made,
        "runs": [_run(run, ways) for run, ways in zip(runs, drawn, strict=True)],
        "config": _configurations(runs),
    }
    parts = {
        "title": html.escape(title),
        "generator": html.escape(GENERATOR),
        "style": _part("page.css"),
        "data": embedded(data),
        "script": _part("charts.js") + _part("page.js"),
    }
    text = _part("page.html")
    pieces = text.split("{{")
    return pieces[0] + "".join(parts[name] + rest for name, rest in (piece.split("}}", 1) for piece in pieces[1:]))


def embedded(data: Any) -> str:
    """JSON that may stand within a script element: nothing in it ends the element or begins a comment."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _part(name: str) -> str:
    return resources.files("soflow_fast.runs.gallery").joinpath(name).read_text(encoding="utf-8")


def _run(run: Run, ways: Ways | None) -> dict[str, Any]:
    device = str(run.config.get("run.device") or "")
    facts = {
        "Preset": run.config.get("preset"),
        "Objective": run.config.get("objective.kind"),
        "Network": _network(run.config),
        "Batch": run.config.get("batch_size"),
        "Precision": f"{run.config['precision']} on {device}" if "precision" in run.config else None,
        "Code": _code(run.code),
    }
    return {
        "name": run.name,
        "folder": str(run.folder),
        "objective": str(run.config.get("objective.kind") or "soflow"),
        "status": run.status,
        "step": run.step,
        "steps": run.steps,
        "batch": run.config.get("batch_size") if type(run.config.get("batch_size")) is int else 0,
        "seconds": _rounded(run.seconds),
        "facts": [[name, str(value)] for name, value in facts.items() if value not in (None, "")],
        "curves": {name: _curve(curve) for name, curve in run.curves.items() if curve.steps or curve.not_finite},
        "grids": [{"step": grid.step, "uri": grid.uri} for grid in run.grids],
        "figures": [[name, value] for name, value in run.figures],
        "ways": None if ways is None else vars(ways),
        "notes": run.notes,
    }


def _curve(curve: Curve) -> dict[str, Any]:
    found: dict[str, Any] = {"steps": curve.steps, "mean": [_rounded(value) for value in curve.mean]}
    if curve.low != curve.high:
        found |= {"low": [_rounded(value) for value in curve.low], "high": [_rounded(value) for value in curve.high]}
    return found | ({"wrong": curve.not_finite} if curve.not_finite else {})


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else 0.0


def _network(config: dict[str, Any]) -> str | None:
    names = ("model.hidden_size", "model.depth", "model.patch_size", "model.input_size", "model.in_channels")
    if not all(name in config for name in names):
        return None
    width, depth, patch, size, channels = (config[name] for name in names)
    return f"{depth} blocks of width {width}, patches of {patch}, on {channels} x {size} x {size}"


def _code(code: dict[str, Any]) -> str | None:
    parts = [f"{name} {code[name]}" for name in ("soflow-fast", "torch") if code.get(name)]
    commit = code.get("commit")
    if isinstance(commit, str) and commit:
        dirty = commit.endswith("-dirty")
        parts.insert(1, f"commit {commit.removesuffix('-dirty')[:10]}{' with changes' if dirty else ''}")
    return ", ".join(parts) or None


def _configurations(runs: list[Run]) -> list[dict[str, Any]]:
    """Every field of the configurations, its value in each run and whether they differ; what is learned comes first."""
    names = dict.fromkeys(name for run in runs for name in run.config)
    rows = []
    for name in sorted(names, key=lambda name: name.startswith("run.")):
        values = [json.dumps(run.config[name]) if name in run.config else "" for run in runs]
        known = {value for run, value in zip(runs, values, strict=True) if run.config}
        rows.append({"name": name, "values": values, "differs": len(known) > 1})
    return rows
