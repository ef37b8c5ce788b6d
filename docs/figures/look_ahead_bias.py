"""The distance of the solution that consistency tends to from the exact one, over the look-ahead r."""

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.report.figures import Theme

RECORDS = ("book",)
SOURCES = ()


def draw(theme: Theme, run: dict) -> Figure:
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, 3)
    rows = [row for row in run["rows"] if row["kind"] == "solution bias"]
    intervals = list(dict.fromkeys((row["t"], row["s"]) for row in rows))
    for axes, (t, s) in zip(panels, intervals, strict=False):
        _lines(axes, theme, [row for row in rows if (row["t"], row["s"]) == (t, s)])
        axes.set_title(f"f_r(x, {t:g}, {s:g}), noise x")
    _lines(panels[-1], theme, [row for row in run["rows"] if row["kind"] == "quotient bias"])
    panels[-1].set_title("E[q] at the exact solution")
    panels[0].set_ylabel("distance from exact")
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=4, fontsize=8)
    return figure


def _lines(axes, theme: Theme, rows: list[dict]) -> None:
    rows = sorted(rows, key=lambda row: row["r"])
    r = [row["r"] for row in rows]
    first = rows[0]["mean_velocity"]["median"] / r[0]
    axes.plot(r, [first * value for value in r], color=theme.muted, linestyle=":", label="proportional to r")
    for way, figure, colour, style, label in (
        ("mean_velocity", "median", 0, "-", "along v(x, t), median"),
        ("drawn_velocity", "median", 1, "-", "along drawn v_t, median"),
        ("drawn_velocity", "rms", 1, "--", "along drawn v_t, root mean square"),
    ):
        if figure == "rms" and rows[0]["kind"] == "quotient bias":
            continue  # a few points make all of it, and its error is as large
        values = [row[way][figure] for row in rows]
        axes.plot(r, values, color=theme.colours[colour], linestyle=style, marker=".", label=label)
    axes.set(xscale="log", yscale="log", xlabel="look-ahead r")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
