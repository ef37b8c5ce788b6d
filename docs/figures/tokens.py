"""Error of one-step samples against the exact solution: over FLOPs of training, and at their end by frequency."""

from statistics import mean

from matplotlib.figure import Figure

from benchmarks.report.figures import Theme
from benchmarks.report.tokens_tables import band_names, compared_runs

RECORDS = ("tokens",)
SOURCES = ("benchmarks/report/tokens_tables.py",)
LINES = {"base": "-", "fewer steps": "-", "smaller batch": "--", "width": ":"}


def draw(theme: Theme, run: dict) -> Figure:
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    over, bands = figure.subplots(1, 2)
    colours = dict(zip((64, 256, 1024), theme.colours, strict=False))
    for runs in compared_runs(run["rows"]):
        first = runs[0]
        style = {"color": colours[first["tokens"]], "linestyle": LINES[first["name"]], "marker": "."}
        how = "" if first["name"] == "base" else f", {first['name']} {first['hidden']}".removesuffix(" 64")
        points = list(zip(*(each["points"] for each in runs), strict=True))
        flops = [mean(point["flops"] for point in at) / 1e12 for at in points]
        over.plot(flops, [mean(point["solution"][0] for point in at) for at in points], **style)
        ends = [mean(point["solution"][k] for point in points[-1]) for k in range(1, len(points[-1][0]["solution"]))]
        bands.plot(range(len(ends)), ends, label=f"{first['tokens']} tokens{how}", **style)
    known = next(row["solution"] for row in run["rows"] if row.get("name") == "exact for one Gaussian")
    over.axhline(known[0], color=theme.muted, linestyle="-.", linewidth=1)
    bands.plot(range(len(known) - 1), known[1:], color=theme.muted, linestyle="-.", label="exact for one Gaussian")
    for axes in (over, bands):
        axes.set_yscale("log")
    over.set_xscale("log")
    over.set_yticks([0.2, 0.3, 0.4, 0.6, 0.8, 1.0], ["0.2", "0.3", "0.4", "0.6", "0.8", "1"], minor=False)
    over.minorticks_off()
    over.set_xlabel("TFLOP of training")
    over.set_ylabel("relative error of f(x_1, 1, 0)")
    names = [name.removeprefix("f, ") for name in band_names(len(known) - 1)]
    bands.set_xticks(range(len(known) - 1), names)
    bands.set_xlabel("frequency, half waves per image")
    figure.legend(loc="outside lower center", ncols=4, fontsize=9)
    return figure
