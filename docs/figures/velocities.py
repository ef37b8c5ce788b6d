"""Velocities of the pairs that lead through one point, and their mean, at two times."""

import torch
from matplotlib.figure import Figure

from benchmarks.exact.look_ahead import drawn_velocity
from benchmarks.exact.mixture import ring
from benchmarks.report.figures import Theme

RECORDS = ()
SOURCES = ("benchmarks/exact/mixture.py", "benchmarks/exact/look_ahead.py")


def draw(theme: Theme) -> Figure:
    source, mixture = torch.Generator().manual_seed(0), ring()
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    data, _ = mixture.sample(120, source)
    for axes, time in ((left, 0.9), (middle, 0.4)):
        x = torch.tensor([[0.9, 0.5]], dtype=torch.float64)
        t = torch.full((40,), time, dtype=torch.float64)
        v = drawn_velocity(mixture, x.repeat(40, 1), t, source)
        mean = mixture.velocity(x, t[:1])[0]
        axes.plot(data[:, 0], data[:, 1], ".", markersize=1.5, color=theme.muted)
        ends = x - time * v  # x_0 of each pair
        for end in ends:
            axes.plot([x[0, 0], end[0]], [x[0, 1], end[1]], color=theme.colours[1], linewidth=0.6, alpha=0.7)
        end = x[0] - mean
        axes.annotate("", xy=end.tolist(), xytext=x[0].tolist(), arrowprops={"color": theme.colours[0], "width": 2})
        axes.plot([], [], color=theme.colours[1], linewidth=0.8, label="to the data of each pair")
        axes.plot([], [], color=theme.colours[0], linewidth=3, label="against their mean velocity, −v(x, t)")
        axes.plot(x[:, 0], x[:, 1], "o", color=theme.ink, markersize=5)
        axes.set(
            xlim=(-2.9, 2.9),
            ylim=(-2.9, 2.9),
            aspect="equal",
            xticks=[-2, 0, 2],
            yticks=[-2, 0, 2],
            title=f"x at t = {time:g}",
        )
    left.legend(loc="lower left", fontsize=8)
    side = torch.linspace(-2.6, 2.6, 11, dtype=torch.float64)
    points = torch.cartesian_prod(side, side)
    v = mixture.velocity(points, torch.full((len(points),), 0.4, dtype=torch.float64))
    right.quiver(*points.T, *(-v).T, color=theme.colours[0], angles="xy", scale=33, width=0.005)
    right.plot(data[:, 0], data[:, 1], ".", markersize=1.5, color=theme.muted)
    right.set(
        xlim=(-2.9, 2.9),
        ylim=(-2.9, 2.9),
        aspect="equal",
        xticks=[-2, 0, 2],
        yticks=[-2, 0, 2],
        title="the field −v(x, 0.4)",
    )
    return figure
