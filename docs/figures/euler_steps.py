"""Euler's method in 1, 2 and 10 steps: the exact velocity followed from noise, and samples of a trained network."""

from itertools import pairwise

import torch
from matplotlib.figure import Figure

from benchmarks.exact.mixture import ring
from benchmarks.report.figures import Theme

RECORDS = ("book",)
SOURCES = ("benchmarks/exact/mixture.py",)


def draw(theme: Theme, run: dict) -> Figure:
    mixture, source = ring(), torch.Generator().manual_seed(3)
    figure = Figure(figsize=(9.5, 6.2), layout="constrained")
    rows = figure.subplots(2, 3)
    starts = torch.randn(14, 2, generator=source, dtype=torch.float64)
    exact = torch.stack(_exact(mixture, starts), 1)
    data, _ = mixture.sample(60, source)
    for axes, steps in zip(rows[0], (1, 2, 10), strict=True):
        euler = torch.stack(_euler(mixture, starts, steps), 1)
        axes.plot(data[:, 0], data[:, 1], ".", markersize=1.5, color=theme.muted)
        axes.plot(*exact.permute(2, 1, 0), color=theme.colours[0], linewidth=1)
        axes.plot(*euler.permute(2, 1, 0), color=theme.colours[1], linewidth=1)
        axes.plot(starts[:, 0], starts[:, 1], ".", color=theme.ink, markersize=4)
        axes.set(title=f"exact velocity, {steps} step{'s' * (steps > 1)}")
    rows[0][0].plot([], [], color=theme.colours[0], linewidth=1, label="exact trajectory")
    rows[0][0].plot([], [], color=theme.colours[1], linewidth=1, label="Euler's")
    rows[0][0].legend(loc="lower left", fontsize=8)
    found = [row for row in run["rows"] if row["kind"] == "samples" and row["objective"] == "flow-matching"]
    for axes, row in zip(rows[1], found, strict=True):
        axes.plot(row["points"][:180:2], row["points"][1:180:2], ".", markersize=3, color=theme.colours[1])
        axes.set(title=f"trained, {row['way']}")
    for axes in rows.flat:
        axes.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal", xticks=[-2, 0, 2], yticks=[-2, 0, 2])
    return figure


def _exact(mixture, x: torch.Tensor) -> list[torch.Tensor]:
    times, along = torch.linspace(1, 0, 26, dtype=torch.float64), [x]
    for before, after in pairwise(times):
        along.append(mixture.solution(along[-1], before.expand(len(x)), after.expand(len(x)), steps=4))
    return along


def _euler(mixture, x: torch.Tensor, steps: int) -> list[torch.Tensor]:
    along = [x]
    for step in range(steps):
        t = torch.full((len(x),), 1 - step / steps, dtype=torch.float64)
        along.append(along[-1] - mixture.velocity(along[-1], t) / steps)
    return along
