"""The public recipe's times, as densities, and the look-ahead r(k, K) by its four schedules."""

import math

import torch
from matplotlib.figure import Figure

from benchmarks.report.figures import Theme
from soflow_fast.config.schema import ObjectiveConfig
from soflow_fast.objective import Objective

RECORDS = ()
SOURCES = ("soflow_fast/objective.py", "soflow_fast/config/schema.py")


def draw(theme: Theme) -> Figure:
    config = ObjectiveConfig()
    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    t = torch.linspace(0.002, 0.998, 250, dtype=torch.float64)
    laws = {
        "flow matching, t": config.fm_time,
        "consistency, t": config.sc_time,
        "consistency, s (before min(s, t))": config.sc_end_time,
    }
    for (label, law), colour in zip(laws.items(), theme.colours, strict=False):
        left.plot(t, logit_normal(t, *law), color=colour, label=label)
    left.set(xlabel="time", ylabel="density", xlim=(0, 1), ylim=(0, None))
    left.legend(fontsize=8)
    progress = [k / 100 for k in range(101)]
    for schedule, colour in zip(("exponent", "cosine", "linear", "constant"), theme.colours, strict=False):
        objective = Objective(ObjectiveConfig(r_schedule=schedule))
        right.plot(progress, [objective.r(k, 1) for k in progress], color=colour, label=schedule)
    right.set(xlabel="k / K, the share of the training that is done", ylabel="r", yscale="log", xlim=(0, 1))
    right.legend(fontsize=8)
    return figure


def logit_normal(t: torch.Tensor, mean: float, deviation: float) -> torch.Tensor:
    """The density of sigmoid(mean + deviation z), z standard normal."""
    z = (t.logit() - mean) / deviation
    return (-0.5 * z**2).exp() / (deviation * math.sqrt(2 * math.pi) * t * (1 - t))
