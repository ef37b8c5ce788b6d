"""The path from data to noise: clouds of x_t at five times, and the exact trajectories that carry them."""

from itertools import pairwise

import torch
from matplotlib.figure import Figure

from benchmarks.exact.mixture import ring
from benchmarks.report.figures import Theme

RECORDS = ()
SOURCES = ("benchmarks/exact/mixture.py",)


def draw(theme: Theme) -> Figure:
    source, mixture = torch.Generator().manual_seed(0), ring()
    x0, k = mixture.sample(100, source)
    x1 = torch.randn(x0.shape, generator=source, dtype=torch.float64)
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    grid = figure.add_gridspec(2, 5, height_ratios=[2, 2.2])
    for column, time in enumerate((0.0, 0.25, 0.5, 0.75, 1.0)):
        axes = figure.add_subplot(grid[0, column])
        x = (1 - time) * x0 + time * x1
        for colour in (0, 1):
            here = x[k % 2 == colour]
            axes.plot(here[:, 0], here[:, 1], ".", markersize=2.5, color=theme.colours[colour])
        title = {0.0: ", data", 1.0: ", noise"}.get(time, "")
        axes.set(xlim=(-3.3, 3.3), ylim=(-3.3, 3.3), xticks=[], yticks=[], aspect="equal", title=f"t = {time:g}{title}")
    axes = figure.add_subplot(grid[1, :])
    _trajectories(axes, theme)
    return figure


def _trajectories(axes, theme: Theme) -> None:
    """The first coordinate over time, in a problem of one coordinate: two Gaussians, straight pairs and curved ODE."""
    source, mixture = torch.Generator().manual_seed(1), ring(components=2)
    x0, _ = mixture.sample(24, source)
    x1 = torch.randn(x0.shape, generator=source, dtype=torch.float64)
    for data, noise in zip(x0[:, 0], x1[:, 0], strict=True):
        axes.plot([1, 0], [noise, data], color=theme.muted, linewidth=0.9, alpha=0.8)
    starts = torch.zeros(9, 2, dtype=torch.float64)
    starts[:, 0] = torch.linspace(-2.1, 2.1, 9) + 0.02
    times = torch.linspace(1, 0, 51, dtype=torch.float64)
    along = [starts]
    for before, after in pairwise(times):
        along.append(mixture.solution(along[-1], before.expand(9), after.expand(9), steps=4))
    for line in torch.stack(along, 1)[:, :, 0]:
        axes.plot(times, line, color=theme.colours[0])
    axes.plot([], [], color=theme.muted, linewidth=0.9, label="pairs of noise and data: straight, and they cross")
    axes.plot([], [], color=theme.colours[0], label="the ODE's trajectories: curved, and they never cross")
    axes.set(xlabel="time t: noise at 1, data at 0", ylabel="first coordinate", xlim=(1, 0), ylim=(-3, 4.2))
    axes.legend(loc="upper center", ncols=2)
