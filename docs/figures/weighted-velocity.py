"""The error of the velocity that a weighted loss teaches, by the number of dimensions and the power p of the weight."""

from matplotlib.figure import Figure

from benchmarks.report.figures import Theme

RECORDS = ("mixtures",)
SOURCES = ()


def draw(theme: Theme, run: dict) -> Figure:
    rows = [row for row in run["rows"] if row["kind"] == "weighted" and row["problem"] != "ring"]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for p, colour in zip(sorted({row["p"] for row in rows}), theme.colours, strict=False):
        mine = sorted((row for row in rows if row["p"] == p), key=lambda row: row["dimensions"])
        sizes, errors = ([row[name] for row in mine] for name in ("dimensions", "velocity"))
        axes.plot(sizes, errors, marker="o", color=colour, label=f"p = {p:g}")
    axes.set_xscale("log", base=2)
    sizes = sorted({row["dimensions"] for row in rows})
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("dimensions of a scattered mixture")
    axes.set_ylabel("error of the velocity,\nin units of the exact one")
    axes.legend()
    return figure
