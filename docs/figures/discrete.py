"""One grey pixel alone, exact and learned in one step; one-hot digits, and how decided their pixels are."""

import math

from matplotlib.figure import Figure

from benchmarks.report.figures import Theme

RECORDS = ("discrete",)
SOURCES = ()
DRAWN = (
    ("soflow", "1", "SoFlow, 1 call"),
    ("soflow", "4", "SoFlow, 4 calls"),
    ("flow-matching", "10", "flow matching, 10"),
)


def draw(theme: Theme, run: dict) -> Figure:
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    pixel, channel = figure.subplots(1, 2)
    grey = [row for row in run["rows"] if row["kind"] == "pixel" and "curve" in row]
    first = grey[0]["seed"]
    pixel.plot(grey[0]["curve"]["noise"], grey[0]["curve"]["exact"], color=theme.muted, label="exact")
    for row, colour in zip((row for row in grey if row["seed"] == first), theme.colours, strict=False):
        pixel.plot(row["curve"]["noise"], row["curve"]["learned"], color=colour, label=f"learned, p = {row['p']:g}")
    pixel.set_xlabel("noise x_1")
    pixel.set_ylabel("f(x_1, 1, 0) of one grey pixel")
    pixel.set_ylim(-1.6, 1.6)
    pixel.legend()
    usual = next(row["scale"] for row in run["rows"] if row.get("code") == "one-hot")
    for patch, line in ((4, "-"), (2, "--")):
        for (objective, calls, name), colour in zip(DRAWN, theme.colours, strict=False):
            found = [
                row["calls"][calls]["largest_histogram"]
                for row in run["rows"]
                if row["kind"] == "digits" and row["code"] == "one-hot" and row["scale"] == usual
                if row["patch"] == patch and row["objective"] == objective and row["seed"] == first
            ]
            for shares in found:
                middles = [-0.2 + 1.4 * (k + 0.5) / len(shares) for k in range(len(shares))]
                heights = [share or math.nan for share in shares]
                channel.plot(middles, heights, line, color=colour, label=f"{name}, patches of {patch}")
    channel.set_xlabel("largest channel of a one-hot pixel (data: 1)")
    channel.set_ylabel("share of pixels")
    channel.legend(fontsize=8)
    return figure
