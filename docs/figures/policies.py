"""The share of the expert's return that each policy reaches, a point a seed, over its milliseconds an action."""

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.report.figures import Theme

RECORDS = ("policies",)
SOURCES = ()


def draw(theme: Theme, run: dict) -> Figure:
    tasks = list(dict.fromkeys(row["task"] for row in run["rows"]))
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    for task, panel in zip(tasks, figure.subplots(1, len(tasks), squeeze=False)[0], strict=True):
        rows = [row for row in run["rows"] if row["task"] == task]
        for method in dict.fromkeys(row["method"] for row in rows):
            each = [row for row in rows if row["method"] == method]
            shares, times = [100 * row["share"] for row in each], [row["ms_per_action"] for row in each]
            panel.scatter(times, shares, label=method, alpha=0.7)
        panel.axhline(100, color=theme.muted, linewidth=0.8)
        panel.axhline(95, color=theme.muted, linewidth=0.8, linestyle=":")
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_title(task)
        panel.set_xlabel("ms an action, one thread of a CPU")
        panel.set_ylabel("share of the expert's return, %")
        panel.legend(fontsize=8)
    return figure
