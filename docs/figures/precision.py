"""Frechet distance of one-step digits by the way in which the quotient was computed in training, a dot a seed."""

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.report.figures import Theme

RECORDS = ("precision",)
SOURCES = ()


def draw(theme: Theme, run: dict) -> Figure:
    rows = [row for row in run["rows"] if row["kind"] == "quality" and row["nfe"]]
    names = list(dict.fromkeys(row["recipe"] for row in rows))
    ends = list(dict.fromkeys(row["r_end"] for row in rows))
    figure = Figure(figsize=(8, 0.5 + 0.45 * len(names)), layout="constrained")
    axes = figure.subplots()
    for k, r in enumerate(ends):
        group = [row for row in rows if row["r_end"] == r]
        heights = [names.index(row["recipe"]) + 0.2 * (k - (len(ends) - 1) / 2) for row in group]
        axes.scatter([row["nfe"]["1"]["frechet"] for row in group], heights, label=f"r_end = {r:g}", alpha=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("Frechet distance of one-step digits, pixel space (lower is better)")
    axes.legend()
    return figure
