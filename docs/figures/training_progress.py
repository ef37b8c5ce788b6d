"""Samples of one network call as the training of SoFlow goes on, and the two losses of its steps."""

from matplotlib.figure import Figure

from benchmarks.report.figures import Theme

RECORDS = ("book",)
SOURCES = ()


def draw(theme: Theme, run: dict) -> Figure:
    snapshots = [row for row in run["rows"] if row["kind"] == "progress"]
    (losses,) = (row for row in run["rows"] if row["kind"] == "losses" and row["objective"] == "soflow")
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    grid = figure.add_gridspec(2, len(snapshots), height_ratios=[1, 1.2])
    for column, row in enumerate(snapshots):
        axes = figure.add_subplot(grid[0, column])
        axes.plot(row["points"][:260:2], row["points"][1:260:2], ".", markersize=2.5, color=theme.colours[0])
        axes.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal", xticks=[], yticks=[])
        axes.set_title(f"step {row['step']}\n{100 * row['on_the_ring']:.0f} % on the ring", fontsize=9)
    axes = figure.add_subplot(grid[1, :])
    axes.plot(losses["step"], losses["fm_mse"], color=theme.colours[1], label="fm_mse, flow matching: mean delta^2")
    axes.plot(losses["step"], losses["sc_mse"], color=theme.colours[2], label="sc_mse, consistency: mean q^2")
    axes.set(xlabel="step", ylim=(0, None), xlim=(0, None))
    axes.legend(ncols=2)
    return figure
