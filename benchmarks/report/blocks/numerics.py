"""Blocks of rounding: errors of quotients and derivatives, what they cost, what is learned with them."""

import itertools

from benchmarks.harness.race import figures
from benchmarks.report.blocks.layout import measured, page
from benchmarks.report.tables import (
    distance_table,
    quartiles,
    spread,
)


def precision_errors(run: dict) -> str:
    """A record of benchmarks.precision as Markdown: relative error and cosine of the quotient, by r and way."""
    rows = [row for row in run["rows"] if row["kind"] == "error"]
    ways = list(dict.fromkeys(row["way"] for row in rows))
    found = {(row["r"], row["way"]): f"{row['error']:.1e} / {row['cosine']:.5f}" for row in rows}
    lines = [[f"{r:g}", *(found[r, way] for way in ways)] for r in dict.fromkeys(r for r, _ in found)]
    return page(["r", *ways], 1 + len(ways), lines, run, f"`{run['command']}`.")


def distance(run: dict) -> str:
    """A record of benchmarks.distance as Markdown."""
    trained = {row["network"]: row["steps"] for row in run["rows"]}
    interval = run["rows"][0]["median_interval"]
    networks = "; ".join(f"{name}: {steps} steps" for name, steps in trained.items())
    note = (
        f"256 samples of each network ({networks}), whose median t - s is {interval:.2f}: at r = 0.002 SoFlow's ends "
        f"are {0.002 * interval:.4f} apart. `{run['command']}`."
    )
    return f"{distance_table(run['rows'])}\n\n{measured(run, note)}"


def precision_quality(run: dict) -> str:
    """A record of benchmarks.precision as Markdown: what each recipe learned, mean and range over the seeds."""
    rows = [row for row in run["rows"] if row["kind"] == "quality"]
    head = ["recipe", "r_end", "Frechet, 1 step", "2 steps", "accuracy, 1 step", "2 steps", "mean q^2", "mean weight"]
    lines = []
    for r, recipe in dict.fromkeys((row["r_end"], row["recipe"]) for row in rows):
        group = [row for row in rows if (row["r_end"], row["recipe"]) == (r, recipe)]
        lost = sum(not row["nfe"] for row in group)
        cells = [f"{recipe} ({lost} of {len(group)} not finite, left out)" if lost else recipe, f"{r:g}"]
        for figure, digits in (("frechet", 1), ("accuracy", 4)):
            cells += [spread([row["nfe"][nfe][figure] for row in group if row["nfe"]], digits) for nfe in ("1", "2")]
        cells += [spread([row["last"][name] for row in group if row["nfe"]], 2) for name in ("sc_mse", "sc_weight")]
        lines.append(cells)
    seeds = len({row["seed"] for row in rows})
    note = (
        f"Mean over {seeds} seeds (lowest to highest). mean q^2 and mean weight over the last 100 steps. "
        f"`{run['command']}`."
    )
    return page(head, len(head) - 1, lines, run, note)


def increments(run: dict) -> str:
    """A record of benchmarks.increments as Markdown: a line per case and contestant."""
    lines = []
    for case, group in itertools.groupby(run["rows"], key=lambda row: row["case"]):
        rows = list(group)
        found = {row["way"]: figures(row) for row in rows}
        for k, (way, f) in enumerate(found.items()):
            against = "forward" if way == "paired forward" else "step, increments ride along"
            ratio = f["median_ms"] / found[against]["median_ms"]
            compared = way not in ("forward", "step, increments ride along")
            ms = quartiles(rows[k]["seconds"], 1e-3)
            lines.append([case if k == 0 else "", way, ms, f"{ratio:.2f}x" if compared else ""])
    note = (
        "bf16, everything in turn; steps against the first, the paired forward against one forward of the whole batch. "
        f"`{run['command']}`."
    )
    return page(["network and batch", "what", "ms (quartiles)", "ratio"], 2, lines, run, note)


def derivative(run: dict) -> str:
    """A record of benchmarks.derivative as Markdown: a line per case, precision and way."""
    lines, before = [], ("", "")
    for row in run["rows"]:
        case, precision = row["case"], row["precision"]
        first = case if case != before[0] else ""
        second = precision if (case, precision) != before else ""
        lines.append([first, second, row["way"], f"{row['error']:.1e}", quartiles(row["seconds"], 1e-3)])
        before = case, precision
    note = (
        f"After {run['rows'][0]['steps']} steps of training; the error is relative to forward mode in float64, the "
        f"time that of the derivative alone, everything in turn. `{run['command']}`."
    )
    return page(["network and batch", "student", "du/dt by", "error", "ms (quartiles)"], 2, lines, run, note)
