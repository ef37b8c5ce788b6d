"""The three identities of the solution function, on an exact flow of one dimension."""

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.exact.mixture import Mixture
from benchmarks.report.figures import Theme

RECORDS = ()
SOURCES = ("benchmarks/exact/mixture.py",)

WEIGHTS, MEANS, DEVIATIONS = (0.45, 0.55), (-1.8, 1.4), (0.2, 0.2)
STARTS = (-1.8, -1.2, -0.8, -0.5, -0.15, 0.1, 0.4, 0.8, 1.3)
"""Noise from which the grey lines begin."""
CHOSEN = -0.28
"""That of the line that the panels are about."""
T, L, S = 0.92, 0.6, 0.2
STEPS = 8
"""Of the integration over a hundredth of time."""


def data() -> Mixture:
    """Two Gaussians on a line."""
    weights, means, deviations = (torch.tensor(row, dtype=torch.float64) for row in (WEIGHTS, MEANS, DEVIATIONS))
    return Mixture(weights, means[:, None], deviations[:, None])


def followed(mixture: Mixture, noise: tuple[float, ...]) -> Tensor:
    """The states [101, B] of the flow from noise at t = 1 to data, at each hundredth of time."""
    x = torch.tensor(noise, dtype=torch.float64)[:, None]
    states = [x]
    for k in range(100, 0, -1):
        t, s = (torch.full((len(x),), at / 100, dtype=torch.float64) for at in (k, k - 1))
        x = mixture.solution(x, t, s, steps=STEPS)
        states.append(x)
    return torch.stack(states)[..., 0]


def draw(theme: Theme) -> Figure:
    mixture = data()
    times = torch.linspace(1, 0, 101, dtype=torch.float64)
    grey, line = followed(mixture, STARTS), followed(mixture, (CHOSEN,))[:, 0]
    at = {t: line[round(100 * (1 - t))].item() for t in (T, L, S)}

    def jump(axes: Axes, start: float, end: float, colour: str) -> None:
        arrow = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.6, "shrinkA": 3, "shrinkB": 3}
        axes.annotate("", (end, at[end]), (start, at[start]), arrowprops=arrow)

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    start, end, two = figure.subplots(1, 3, sharey=True)
    for axes, name in ((start, "start moves: same end"), (end, "end moves: by the velocity"), (two, "two jumps: one")):
        axes.plot(times, grey, color=theme.grid, linewidth=1)
        axes.plot(times, line, color=theme.muted, linewidth=1.4)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("time (1 is noise)")
        axes.set_xlim(1, 0)
        axes.set_ylim(-2.2, 2.2)
        axes.grid(visible=False)
    jump(start, T, S, theme.colours[0])
    jump(start, L, S, theme.colours[1])
    jump(end, T, S, theme.colours[0])
    x_s, s = (torch.tensor([value], dtype=torch.float64) for value in (at[S], S))
    v = mixture.velocity(x_s[:, None], s).item()
    reach = 0.16
    end.plot((S - reach, S + reach), (at[S] - reach * v, at[S] + reach * v), color=theme.colours[1])
    jump(two, T, S, theme.colours[0])
    jump(two, T, L, theme.colours[1])
    jump(two, L, S, theme.colours[1])
    for axes, marked in ((start, (T, L, S)), (end, (T, S)), (two, (T, L, S))):
        axes.plot(marked, [at[t] for t in marked], "o", color=theme.ink, markersize=4)
        for t in marked:
            axes.annotate("tls"[(T, L, S).index(t)], (t, at[t]), (0, 8), textcoords="offset points", ha="center")
    start.set_ylabel("x")
    return figure
