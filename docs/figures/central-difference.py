"""The error of a trained network's derivative along the path, by a look-ahead and by a central difference."""

from matplotlib.figure import Figure

from benchmarks.report.figures import Theme

RECORDS = ("mixtures",)
SOURCES = ()
TITLES = {"ring": "ring, 2 dimensions", "scattered": "scattered, 16 dimensions"}
WAYS = {"ahead": "look-ahead", "central": "central"}
STYLES = {"fp64": "--", "fp32": "-"}


def draw(theme: Theme, run: dict) -> Figure:
    rows = [row for row in run["rows"] if row["kind"] == "slope"]
    problems = [name for name in TITLES if any(row["problem"] == name for row in rows)]
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    panels = figure.subplots(1, len(problems), squeeze=False, sharey=True)[0]
    for problem, axes in zip(problems, panels, strict=True):
        for way, colour in zip(WAYS, theme.colours, strict=False):
            for precision, style in STYLES.items():
                mine = [
                    row for row in rows if (row["problem"], row["way"], row["precision"]) == (problem, way, precision)
                ]
                r, errors = ([row[name] for row in mine] for name in ("r", "error"))
                axes.plot(r, errors, style, marker=".", color=colour, label=f"{WAYS[way]}, {precision}")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(TITLES[problem])
        axes.set_xlabel("r, the distance of the two ends in units of t - s")
        axes.legend()
    panels[0].set_ylabel("error of the derivative")
    return figure
