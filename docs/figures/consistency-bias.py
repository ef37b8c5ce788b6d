"""The distance of the consistency loss's fixed point from the exact solution, by r: with random pairs, and with the
marginal velocity in their place."""

from matplotlib.figure import Figure

from benchmarks.report.figures import Theme

RECORDS = ("mixtures",)
SOURCES = ()


def draw(theme: Theme, run: dict) -> Figure:
    rows = [row for row in run["rows"] if row["kind"] == "bias"]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for problem, colour in zip(dict.fromkeys(row["problem"] for row in rows), theme.colours, strict=False):
        mine = sorted((row for row in rows if row["problem"] == problem), key=lambda row: row["r"])
        known = [row for row in mine if row["pair"] > 2 * row["pair_standard_error"]]
        r, pair, errors = ([row[name] for row in known] for name in ("r", "pair", "pair_standard_error"))
        axes.errorbar(r, pair, errors, marker=".", color=colour, label=f"{problem}: pairs")
        r, marginal = ([row[name] for row in mine] for name in ("r", "marginal"))
        axes.plot(r, marginal, marker=".", linestyle="--", color=colour, label=f"{problem}: marginal velocity")
    ends = [0.002, 0.05]
    axes.plot(ends, [0.1 * r for r in ends], color=theme.muted, linewidth=1, linestyle=":")
    axes.annotate("order 1", (ends[0], 0.1 * ends[0]), (2, -12), textcoords="offset points", color=theme.muted)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("r, the share of the interval that the loss looks ahead")
    axes.set_ylabel("distance of $f_r(x_1, 1, 0)$ from the exact $f$,\nin units of the data's spread")
    axes.legend(fontsize=8)
    return figure
