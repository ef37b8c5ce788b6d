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
        mine = sorted((row for row in rows if row["problem"] == problem), key=lambda row: -row["r"])
        for row, colour in zip(mine, theme.colours, strict=False):
            steps, errors = ([point[name] for point in row["points"]] for name in ("step", "judged"))
            axes.plot(steps, errors, marker=".", color=colour, label=f"r = {row['r']:g}")
            axes.axhline(row["bias"], color=colour, linestyle="--", linewidth=1)
        for row in (row for row in central["rows"] if row["problem"] == problem):
            steps, errors = ([point[name] for point in row["points"]] for name in ("step", "judged"))
            axes.plot(steps, errors, marker=".", color=theme.ink, label=f"r = {row['r']:g}, central")
        axes.set_ylim(bottom=0)
        axes.set_title(TITLES[problem])
        axes.set_xlabel("steps of training")
        axes.legend()
    panels[0].set_ylabel("error of $f(x_1, 1, 0)$, in deviations of the data\n(dashed: the fixed point at the same r)")
    return figure
