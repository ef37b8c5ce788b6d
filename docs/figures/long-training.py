"""The error of one-step solutions over long trainings at a constant r, beside the bias of the loss's fixed point."""

from matplotlib.figure import Figure

from benchmarks.report.figures import Theme

RECORDS = ("mixtures", "mixtures-central")
SOURCES = ()
TITLES = {"ring": "ring, 2 dimensions", "scattered": "scattered, 16 dimensions"}


def draw(theme: Theme, run: dict, central: dict) -> Figure:
    rows = [row for row in run["rows"] if row["kind"] == "long"]
    problems = [name for name in TITLES if any(row["problem"] == name for row in rows)]
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    panels = figure.subplots(1, len(problems), squeeze=False)[0]
    for problem, axes in zip(problems, panels, strict=True):
        mine = [row for row in rows if row["problem"] == problem]
        for r, colour in zip(sorted({row["r"] for row in mine}, reverse=True), theme.colours, strict=False):
            each = [row for row in mine if row["r"] == r]
            _line(axes, each, colour, f"r = {r:g}")
            axes.axhline(each[0]["bias"], color=colour, linestyle="--", linewidth=1)
        others = [row for row in central["rows"] if row["problem"] == problem]
        _line(axes, others, theme.ink, f"r = {others[0]['r']:g}, central")
        axes.set_ylim(bottom=0)
        axes.set_title(TITLES[problem])
        axes.set_xlabel("steps of training")
        axes.legend()
    panels[0].set_ylabel(
        "error of $f(x_1, 1, 0)$, in units of the data's\nspread (dashed: the fixed point at the same r)"
    )
    return figure


def _line(axes, rows: list[dict], colour: str, label: str) -> None:
    """The mean over the seeds, and their range."""
    steps = [point["step"] for point in rows[0]["points"]]
    at = list(zip(*([point["one_step"] for point in row["points"]] for row in rows), strict=True))
    axes.plot(steps, [sum(errors) / len(errors) for errors in at], marker=".", color=colour, label=label)
    axes.fill_between(steps, [min(errors) for errors in at], [max(errors) for errors in at], color=colour, alpha=0.2)
