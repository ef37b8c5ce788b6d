"""Time and memory of a step over batch, tokens and depth, both axes logarithmic."""

import statistics

from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from benchmarks.report.figures import Theme
from benchmarks.report.tables import AXES

RECORDS = ("sweeps",)
SOURCES = ("benchmarks/report/tables.py",)

FIGURES = {
    "ms per step": lambda row: statistics.median(row["seconds"]) * 1e3 if row["seconds"] else None,
    "peak memory, MiB": lambda row: row["peak_bytes"] / 2**20 if row["peak_bytes"] else None,
}


def draw(theme: Theme, run: dict) -> Figure:
    figure = Figure(figsize=(10, 6), layout="constrained")
    panels = figure.subplots(2, len(AXES))
    for (name, figure_of), line in zip(FIGURES.items(), panels, strict=True):
        for axis, panel in zip(AXES, line, strict=True):
            rows = [row for row in run["rows"] if row["axis"] == axis]
            recipes = list(dict.fromkeys(row["recipe"] for row in rows))
            for recipe, marker in zip(recipes, "os^v", strict=False):
                points = [(row["value"], figure_of(row)) for row in rows if row["recipe"] == recipe]
                points = [(x, y) for x, y in points if y is not None]
                panel.plot([x for x, _ in points], [y for _, y in points], marker=marker, label=recipe)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            ticks = sorted({row["value"] for row in rows})
            panel.xaxis.set_major_locator(FixedLocator(ticks))
            panel.xaxis.set_major_formatter(FixedFormatter([str(tick) for tick in ticks]))
            panel.xaxis.set_minor_locator(NullLocator())
            panel.set_xlabel(AXES[axis])
            panel.set_ylabel(name)
            panel.grid(which="both")
    panels[0][0].legend()
    return figure
