"""Samples in one to ten calls of the networks that learned solutions and of those that learned the velocity alone."""

from matplotlib.figure import Figure

from benchmarks.report.figures import Theme

RECORDS = ("mixtures",)
SOURCES = ()
TITLES = {"ring": "ring, 2 dimensions", "scattered": "scattered, 16 dimensions"}
WAYS = {
    ("base", "renoise"): "solutions, noise anew",
    ("base", "consecutive"): "solutions, one after the other",
    ("base", "euler"): "their velocity, Euler",
    ("flow matching", "euler"): "flow matching, Euler",
}


def draw(theme: Theme, run: dict) -> Figure:
    rows = [row for row in run["rows"] if row["kind"] == "calls" and row["setting"].startswith("p = 0")]
    rows = [row for row in rows if row["setting"] != "p = 0.5"]
    floors = {row["problem"]: row["distance"] for row in run["rows"] if row["kind"] == "floor"}
    problems = [name for name in TITLES if any(row["problem"] == name for row in rows)]
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    panels = figure.subplots(1, len(problems), squeeze=False)[0]
    for problem, axes in zip(problems, panels, strict=True):
        for ((factor, method), label), colour in zip(WAYS.items(), theme.colours, strict=False):
            found: dict[int, list[float]] = {}
            for row in rows:
                one = method == "consecutive" and row["method"] == "renoise" and row["calls"] == 1
                if (row["problem"], row["factor"]) == (problem, factor) and (row["method"] == method or one):
                    found.setdefault(row["calls"], []).append(row["distance"])
            calls = sorted(found)
            means = [sum(found[n]) / len(found[n]) for n in calls]
            axes.plot(calls, means, marker="o", color=colour, label=label)
            axes.scatter(
                [n for n in calls for _ in found[n]], [d for n in calls for d in found[n]], s=8, color=colour, alpha=0.5
            )
        if problem in floors:
            axes.axhline(floors[problem], color=theme.muted, linestyle="--", linewidth=1, label="exact samples")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks([1, 2, 4, 10], ["1", "2", "4", "10"])
        axes.set_title(TITLES[problem])
        axes.set_xlabel("network calls of a sample")
        axes.legend(loc="upper right", fontsize=8)
    panels[0].set_ylabel("distance of samples to the data,\nin units of the data's spread")
    return figure
