"""Distance of samples from the data over the FLOPs of training, and over the network calls of a sample, by method."""

from typing import Any

from matplotlib.figure import Figure

from benchmarks.report.equal_work_tables import trainings
from benchmarks.report.figures import Theme

RECORDS = ("equal-work",)
SOURCES = ("benchmarks/report/equal_work_tables.py",)
METHODS = ("SoFlow", "MeanFlow", "MeanFlow as published", "flow matching")
PANELS = {"digits": ("frechet", "digits"), "photographs": ("fd_random", "photographs, 32 x 32 pixels")}


def draw(theme: Theme, run: dict) -> Figure:
    figure = Figure(figsize=(9, 7), layout="constrained")
    problems = [problem for problem in PANELS if trainings(run, "work", problem)]
    panels = figure.subplots(2, len(problems), squeeze=False)
    costs = {(row["problem"], row["method"]): row["flops_per_step"] for row in run["rows"] if row["kind"] == "cost"}
    for above, below, problem in zip(*panels, problems, strict=True):
        key, title = PANELS[problem]
        for method, colour in zip(METHODS, theme.colours, strict=False):
            for k, row in enumerate(trainings(run, "work", problem).get(method, [])):
                look: Any = {"color": colour, "marker": ".", "alpha": 0.85, "label": method if k == 0 else None}
                work = [point["step"] * costs[problem, method] / 1e12 for point in row["points"]]
                above.plot(work, [point[key] for point in row["points"]], **look)
                calls = sorted(map(int, row["samples"]))
                below.plot(calls, [row["samples"][str(nfe)][key] for nfe in calls], **look)
        for row in run["rows"]:
            if (row["kind"], row["problem"]) == ("floor", problem):
                for panel in (above, below):
                    panel.axhline(row[key], color=theme.muted, linewidth=0.8, linestyle=":")
        above.set_title(title)
        above.set_xlabel("TFLOP of training")
        below.set_xlabel("network calls of a sample, after all of the work")
        below.set_xscale("log")
        below.set_xticks([1, 2, 4, 10, 25], ["1", "2", "4", "10", "25"])
        below.minorticks_off()
        for panel in (above, below):
            panel.set_yscale("log")
            panel.set_ylabel("Frechet distance (lower is better)")
        above.legend(fontsize=8)
    return figure
