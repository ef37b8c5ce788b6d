"""The solution map f(., 1, s): a grid of noise carried to s = 0.6, 0.3 and 0 exactly, and to 0 by a trained network."""

import torch
from matplotlib.figure import Figure

from benchmarks.exact.mixture import ring
from benchmarks.report.figures import Theme

RECORDS = ("book",)
SOURCES = ("benchmarks/exact/mixture.py",)


def draw(theme: Theme, run: dict) -> Figure:
    mixture = ring()
    (row,) = (row for row in run["rows"] if row["kind"] == "map")
    side = torch.tensor(row["side"], dtype=torch.float64)
    n = len(side)
    grid = torch.cartesian_prod(side, side)
    figure = Figure(figsize=(10, 3), layout="constrained")
    panels = figure.subplots(1, 4)
    one = torch.ones(len(grid), dtype=torch.float64)
    for axes, s in zip(panels, (0.6, 0.3, 0.0), strict=False):
        _mesh(axes, mixture.solution(grid, one, s * one).reshape(n, n, 2), theme)
        axes.set(title=f"exact f(x, 1, {s:g})")
    _mesh(panels[-1], torch.tensor(row["points"]).reshape(n, n, 2), theme)
    panels[-1].set(title="learned f(x, 1, 0)")
    for axes in panels:
        axes.set(xlim=(-2.9, 2.9), ylim=(-2.9, 2.9), aspect="equal", xticks=[], yticks=[])
    return figure


def _mesh(axes, points: torch.Tensor, theme: Theme) -> None:
    for colour, lines in ((0, points), (1, points.transpose(0, 1))):
        for line in lines[::2]:
            axes.plot(line[:, 0], line[:, 1], color=theme.colours[colour], linewidth=0.7)
