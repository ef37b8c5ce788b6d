"""Frechet distance of digits over seconds of training, by objective, a line a seed."""

from matplotlib.figure import Figure

from benchmarks.report.figures import Theme

RECORDS = ("quality-for-time",)
SOURCES = ()


def draw(theme: Theme, run: dict) -> Figure:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for method, colour in zip(dict.fromkeys(row["method"] for row in run["rows"]), theme.colours, strict=False):
        for row in (row for row in run["rows"] if row["method"] == method):
            seconds, distances = ([point[name] for point in row["points"]] for name in ("seconds", "frechet"))
            label = method if row["seed"] == run["rows"][0]["seed"] else None
            axes.plot(seconds, distances, marker=".", color=colour, alpha=0.8, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("Frechet distance of digits\nin as few calls as usual (lower is better)")
    axes.grid(which="both")
    axes.legend()
    return figure
