"""What guidance does to an exact flow: samples of one class at three scales, and the decay c(t)."""

import torch
from matplotlib.figure import Figure

from benchmarks.exact.mixture import Mixture
from benchmarks.report.figures import Theme
from soflow_kernels.lookahead import guidance_decay

RECORDS = ()
SOURCES = ("benchmarks/exact/mixture.py", "kernels/soflow_kernels/lookahead.py")

MEANS = ((-1.5, 0.0), (0.9, 0.9), (0.9, -0.9))
DEVIATIONS = ((0.6, 0.9), (0.6, 0.5), (0.6, 0.5))
CLASS = 1
SAMPLES, PATHS, STEPS = 100, 10, 200
CASES = ((1.0, 1.0), (3.0, 1.0), (3.0, 0.8))
"""The guidance scale and the decay time of each panel of samples."""
DECAY_TIMES = (0.8, 0.5)


def data() -> Mixture:
    """Three classes in the plane that overlap."""
    weights = torch.full((3,), 1 / 3, dtype=torch.float64)
    means, deviations = (torch.tensor(rows, dtype=torch.float64) for rows in (MEANS, DEVIATIONS))
    return Mixture(weights, means, deviations)


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


def draw(theme: Theme) -> Figure:
    figure = Figure(figsize=(10, 2.8), layout="constrained")
    *panels, last = figure.subplots(1, 4)
    mixture, source = data(), torch.Generator().manual_seed(0)
    noise = torch.randn(SAMPLES, 2, generator=source, dtype=torch.float64)
    others, component = mixture.sample(3 * SAMPLES, source)
    others = others[component != CLASS][:SAMPLES]
    for axes, (w, decay_time) in zip(panels, CASES, strict=True):
        paths = guided_paths(mixture, noise, w, decay_time)
        axes.plot(*others.T, ".", color=theme.muted, markersize=2)
        axes.plot(*paths[::10, :PATHS].permute(2, 0, 1), color=theme.colours[0], linewidth=0.7)
        axes.plot(*paths[-1].T, ".", color=theme.colours[1], markersize=3)
        axes.set(xlim=(-3.2, 3.4), ylim=(-2.6, 3.4), xticks=[], yticks=[], aspect="equal")
        axes.set_frame_on(False)
        axes.set_title(f"w = {w:g}" + (f", $t_d$ = {decay_time:g}" if decay_time < 1 else ""), fontsize=10)
    t = torch.linspace(0, 1, 301, dtype=torch.float64)
    for colour, decay_time in zip(theme.colours[2:4], DECAY_TIMES, strict=True):
        last.plot(t, guidance_decay(t, decay_time), color=colour, label=f"$t_d$ = {decay_time:g}")
    last.set_title("decay c(t)", fontsize=10)
    last.set_xlabel("t (1 is noise)")
    last.legend()
    return figure
