"""The relative error of the consistency quotient over r, by pairs of forwards and by increments."""

from matplotlib.figure import Figure

RECORDS: tuple[str, ...] = ("precision",)
SOURCES: tuple[str, ...] = ()

WAYS = ("bf16 pair", "fp16 pair", "float32 pair", "bf16 increments", "float32 increments")


def draw(theme, precision: dict) -> Figure:
    errors = [row for row in precision["rows"] if row["kind"] == "error"]
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    at = figure.subplots()
    for color, way in zip(theme.colours, WAYS, strict=False):
        points = sorted((row["r"], row["error"]) for row in errors if row["way"] == way)
        style = "-" if way.endswith("pair") else "--"
        at.loglog(*zip(*points, strict=True), style, marker="o", markersize=4, color=color, label=way)
    at.axhline(1, color=theme.muted, linewidth=0.8)
    at.annotate("error as large as q", (0.1, 1), (0, 4), textcoords="offset points", ha="right", color=theme.muted)
    at.set_xlabel("r = (t - l) / (t - s)", color=theme.ink)
    at.set_ylabel("relative error of q", color=theme.ink)
    at.grid(color=theme.grid, linewidth=0.6)
    at.tick_params(colors=theme.ink)
    figure.legend(*at.get_legend_handles_labels(), loc="outside right", frameon=False, labelcolor=theme.ink)
    return figure
