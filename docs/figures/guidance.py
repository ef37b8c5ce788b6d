"""What guidance does to an exact flow: samples of one class at three scales, and the decay c(t)."""

import torch
from matplotlib.figure import Figure

from benchmarks.exact.mixture import Mixture
from soflow_kernels.lookahead import guidance_decay

RECORDS: tuple[str, ...] = ()
SOURCES: tuple[str, ...] = ("benchmarks/exact/mixture.py", "kernels/soflow_kernels/lookahead.py")

MEANS = ((-1.5, 0.0), (0.9, 0.9), (0.9, -0.9))
DEVIATIONS = ((0.6, 0.9), (0.6, 0.5), (0.6, 0.5))
CLASS = 1
SAMPLES, PATHS, STEPS = 100, 10, 200
CASES = ((1.0, 1.0), (3.0, 1.0), (3.0, 0.8))
"""The guidance scale and the decay time of each panel."""


def data() -> Mixture:
    """Three classes in the plane that overlap."""
    weights = torch.full((3,), 1 / 3, dtype=torch.float64)
    return Mixture(weights, *(torch.tensor(rows, dtype=torch.float64) for rows in (MEANS, DEVIATIONS)))


def guided_paths(mixture: Mixture, x: torch.Tensor, w: float, decay_time: float) -> torch.Tensor:
    """The states [STEPS + 1, B, 2] from noise x at t = 1 to t = 0, by Heun's method along the guided velocity."""
    k = torch.full((len(x),), CLASS)

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        at = torch.full((len(x),), t, dtype=torch.float64)
        of_class, of_all = mixture.velocity(x, at, k), mixture.velocity(x, at)
        return of_class + (guidance_decay(at, decay_time) * (w - 1))[:, None] * (of_class - of_all)

    states, h = [x], 1 / STEPS
    for step in range(STEPS):
        t = 1 - step * h
        first = velocity(x, t)
        x = x - h / 2 * (first + velocity(x - h * first, t - h))
        states.append(x)
    return torch.stack(states)


def draw(theme) -> Figure:
    figure = Figure(figsize=(9.6, 2.7), layout="constrained")
    axes = figure.subplots(1, 4)
    mixture, source = data(), torch.Generator().manual_seed(0)
    noise = torch.randn(SAMPLES, 2, generator=source, dtype=torch.float64)
    others, component = mixture.sample(3 * SAMPLES, source)
    others = others[component != CLASS][:SAMPLES]
    for at, (w, decay_time) in zip(axes, CASES, strict=False):
        paths = guided_paths(mixture, noise, w, decay_time)
        at.plot(*others.T, ".", color=theme.muted, markersize=2, alpha=0.5, zorder=0)
        at.plot(*paths[::10, :PATHS].permute(2, 0, 1), color=theme.colours[0], linewidth=0.6, alpha=0.7)
        at.plot(*paths[-1].T, ".", color=theme.colours[1], markersize=3)
        at.set(xlim=(-3.2, 3.4), ylim=(-2.6, 3.4), xticks=[], yticks=[], aspect="equal")
        decay = ", decay from 0.8" if decay_time < 1 else ""
        at.set_title(f"w = {w:g}{decay}", fontsize=9, color=theme.ink)
    t = torch.linspace(0, 1, 501, dtype=torch.float64)
    for color, decay_time in zip(theme.colours[2:], (0.8, 0.5), strict=False):
        axes[3].plot(t, guidance_decay(t, decay_time), color=color, linewidth=1.6, label=f"$t_d$ = {decay_time:g}")
    axes[3].set_title("decay c(t)", fontsize=9, color=theme.ink)
    axes[3].set_xlabel("t (1 is noise)", fontsize=8, color=theme.ink)
    axes[3].tick_params(labelsize=8, colors=theme.ink)
    axes[3].grid(color=theme.grid, linewidth=0.6)
    axes[3].legend(fontsize=8, frameon=False, labelcolor=theme.ink)
    return figure
