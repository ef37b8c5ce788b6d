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
    fine = torch.linspace(side[0], side[-1], 2 * len(side) - 1, dtype=torch.float64)
    across = torch.cartesian_prod(side[::3], fine).reshape(-1, len(fine), 2)
    lines = torch.cat([across, across.flip(-1)])
    figure = Figure(figsize=(10, 3), layout="constrained")
    panels = figure.subplots(1, 4)
    one = torch.ones(lines.shape[:2].numel(), dtype=torch.float64)
    for axes, s in zip(panels, (0.6, 0.3, 0.0), strict=False):
        _mesh(axes, mixture.solution(lines.reshape(-1, 2), one, s * one).reshape(lines.shape), theme)
        axes.set(title=f"exact f(x, 1, {s:g})")
    learned = torch.tensor(row["points"]).reshape(len(side), len(side), 2)
    _mesh(panels[-1], torch.cat([learned[::3], learned.transpose(0, 1)[::3]]), theme)
    panels[-1].set(title="learned f(x, 1, 0)")
    for axes in panels:
        axes.set(xlim=(-2.9, 2.9), ylim=(-2.9, 2.9), aspect="equal", xticks=[], yticks=[])
    return figure


def _mesh(axes, lines: torch.Tensor, theme: Theme) -> None:
    for number, line in enumerate(lines):
        axes.plot(line[:, 0], line[:, 1], color=theme.colours[int(number >= len(lines) / 2)], linewidth=0.7)
