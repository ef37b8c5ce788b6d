"""The law of MeanFlow's draws, which their check shares with the recipes and so cannot judge."""

import math
from dataclasses import replace

import pytest
import torch

from benchmarks.baselines import meanflow
from benchmarks.baselines.meanflow import Settings
from benchmarks.harness.contestants import QUARTER
from benchmarks.harness.recipes import build
from tests.benchmarks.tiny import CONFIG

SAMPLES = 4096


def distance(samples: torch.Tensor, law) -> float:
    """Kolmogorov and Smirnov's distance of samples from a distribution function, times the root of their number."""
    values = law(samples.sort().values.double())
    n = len(values)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return float(torch.maximum((values - steps[:-1]).abs().max(), (steps[1:] - values).abs().max())) * math.sqrt(n)


def normal(value: torch.Tensor) -> torch.Tensor:
    return torch.special.ndtr(value.double())


KOLMOGOROV = 2.2
"""Exceeded by one in 10^4 draws of a right law, 2 exp(-2 x^2)."""


def check_draws(draws: meanflow.Draws) -> None:
    """The published law: logits of both times N(-0.4, 1), t the larger; r = t for the first 75 %; labels dropped with
    probability 0.1."""
    n, t, r = draws.n_equal, draws.t, draws.r
    assert n == 3 * SAMPLES // 4 and len(t) == len(r) == SAMPLES
    assert torch.equal(t[:n], r[:n]) and bool((r[n:] < t[n:]).all()), "order"
    below_t, below_r = normal(torch.logit(t.double()) + 0.4), normal(torch.logit(r.double()) + 0.4)
    assert distance(below_t, lambda p: p**2) < KOLMOGOROV, "law of t"
    assert distance(below_r[n:], lambda p: 1 - (1 - p) ** 2) < KOLMOGOROV, "law of r"
    assert distance(below_r[n:] / below_t[n:], lambda p: p) < KOLMOGOROV, "law of r given t"
    rate, deviation = 0.1, math.sqrt(0.1 * 0.9 / SAMPLES)
    assert abs(draws.label_dropped.double().mean().item() - rate) < 4 * deviation, "labels"
    assert abs(draws.label_dropped[n:].double().mean().item() - rate) < 8 * deviation, "labels where r != t"
    assert distance(draws.x1.flatten(), normal) < KOLMOGOROV, "noise"


def drawn(settings: Settings, step: int = 0) -> meanflow.Draws:
    state = build(QUARTER, replace(CONFIG, batch_size=SAMPLES))
    state.step = step
    return meanflow.draw(state, torch.Size((SAMPLES, 2, 4, 4)), settings)


def test_draws():
    first, second = drawn(Settings()), drawn(Settings(), step=1)
    for draws in (first, second):
        check_draws(draws)
    assert all(not torch.equal(a, b) for a, b in zip(first[:4], second[:4], strict=True))


MISDRAWN = {
    "order": lambda d: d._replace(t=d.r, r=d.t),
    "order ": lambda d: d._replace(r=torch.cat([d.r[:-1], d.t[-1:] + 1e-3])),
    "order  ": lambda d: d._replace(r=torch.cat([d.r[:1] * 0.999, d.r[1:]])),
    "law of r": lambda d: d._replace(r=torch.cat([d.t[: d.n_equal], 0.9 * d.t[d.n_equal :]])),
    "law of r given t": lambda d: d._replace(
        t=torch.cat([d.t[: d.n_equal], d.t[d.n_equal :].sort().values]),
        r=torch.cat([d.r[: d.n_equal], d.r[d.n_equal :].sort().values]),
    ),
    "law of t": lambda d: d._replace(t=d.t**0.9, r=torch.cat([d.t[: d.n_equal] ** 0.9, d.r[d.n_equal :]])),
    "labels": lambda d: d._replace(label_dropped=torch.zeros_like(d.label_dropped)),
    "labels where r != t": lambda d: d._replace(label_dropped=d.label_dropped.sort(descending=True).values),
    "noise": lambda d: d._replace(x1=1.1 * d.x1),
}


@pytest.mark.parametrize("tamper", MISDRAWN.items(), ids=lambda item: item[0])
def test_draws_of_another_law_are_found(tamper):
    name, change = tamper
    with pytest.raises(AssertionError, match=name.strip()):
        check_draws(change(drawn(Settings())))


def test_draws_with_the_times_of_soflow():
    objective = CONFIG.objective
    draws = drawn(Settings(time=None))
    n, t, r = draws.n_equal, draws.t, draws.r
    assert n == round(objective.fm_fraction * SAMPLES)
    assert torch.equal(t[:n], r[:n]) and bool((r[n:] < t[n:]).all())
    for times, (mean, deviation) in ((t[:n], objective.fm_time), (t[n:], objective.sc_time)):
        below = normal((torch.logit(times.double()) - mean) / deviation)
        assert distance(below, lambda p: p) < KOLMOGOROV
