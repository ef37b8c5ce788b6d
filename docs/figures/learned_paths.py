"""The solutions through 16 points of noise, exact and as a trained network has them in one call for each time s."""

import torch
from matplotlib.figure import Figure

from benchmarks.exact.mixture import ring
from benchmarks.report.figures import Theme

RECORDS = ("book",)
SOURCES = ("benchmarks/exact/mixture.py",)


def draw(theme: Theme, run: dict) -> Figure:
    mixture = ring()
    (row,) = (row for row in run["rows"] if row["kind"] == "trajectories")
    times = torch.tensor(row["times"], dtype=torch.float64)
    learned = torch.tensor(row["points"], dtype=torch.float64).reshape(-1, len(times), 2)
    starts, one = learned[:, 0], torch.ones(len(learned), dtype=torch.float64)
    exact = torch.stack([mixture.solution(starts, one, s * one) for s in times], 1)
    figure = Figure(figsize=(9.5, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    data, _ = mixture.sample(120, torch.Generator().manual_seed(0))
    left.plot(data[:, 0], data[:, 1], ".", markersize=1.5, color=theme.muted)
    left.plot(*exact.permute(2, 1, 0), color=theme.colours[0], linewidth=1.2)
    left.plot(*learned.permute(2, 1, 0), color=theme.colours[1], linewidth=1.2, linestyle="--")
    left.plot(starts[:, 0], starts[:, 1], ".", color=theme.ink, markersize=5)
    left.plot([], [], color=theme.colours[0], label="exact")
    left.plot([], [], color=theme.colours[1], linestyle="--", label="learned, one call for each s")
    left.legend(loc="lower left", fontsize=8)
    left.set(xlim=(-3.1, 3.1), ylim=(-3.1, 3.1), aspect="equal", title="f(x, 1, s) from s = 1 to 0")
    apart = (learned - exact).norm(dim=-1)
    right.plot(times, apart.T, color=theme.muted, linewidth=0.8)
    right.plot(times, apart.median(0).values, color=theme.colours[1], label="median of the 16")
    right.set(xlim=(1, 0), xlabel="s", ylabel="distance of learned from exact")
    right.legend(loc="upper left")
    return figure
