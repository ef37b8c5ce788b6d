"""Relative error of the consistency quotient over r, by pairs of forwards and by increments."""

from matplotlib.figure import Figure

from benchmarks.report.figures import Theme

RECORDS = ("precision",)
SOURCES = ()

WAYS = ("bf16 pair", "fp16 pair", "float32 pair", "bf16 increments", "float32 increments")


def draw(theme: Theme, run: dict) -> Figure:
    errors = [row for row in run["rows"] if row["kind"] == "error"]
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    for way in WAYS:
        points = sorted((row["r"], row["error"]) for row in errors if row["way"] == way)
        axes.loglog(*zip(*points, strict=True), "-" if way.endswith("pair") else "--", marker="o", ms=4, label=way)
    axes.axhline(1, color=theme.muted, linewidth=1)
    axes.text(0.1, 1.3, "as large as q", color=theme.muted, ha="right")
    axes.set_xlabel("r = (t - l) / (t - s)")
    axes.set_ylabel("relative error of q")
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure
