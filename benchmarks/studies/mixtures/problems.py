"""Two mixtures of Gaussians as data, the points at which networks are judged, and how a network is trained on them.

A point of D numbers is an image [D, 1, 1] of one token, so that the engine's DiT and its step are those of images.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.exact.mixture import Mixture, ring, scattered
from soflow_fast.config.schema import (
    Config,
    DataConfig,
    DiTConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    override,
)
from soflow_fast.flow import SolutionFlow
from soflow_fast.rng import generator

RING, SCATTERED = "ring", "scattered"
DIMENSIONS = {RING: 2, SCATTERED: 16}
HELD = 2000
"""Points of each kind at which errors are measured."""
SAMPLES = 4000
"""Samples whose distance to the data is measured."""
SOLUTION_STEPS = 128
"""Runge-Kutta steps of the exact solutions."""


@functools.cache
def mixture(name: str) -> Mixture:
    """The data of a problem, by its name."""
    return {RING: ring, SCATTERED: scattered}[name]()


class Points(NamedTuple):
    """Points x [n, D] at times t [n], where they are to go, s [n], and f(x, t, s) [n, D]; all float64."""

    x: Tensor
    t: Tensor
    s: Tensor
    exact: Tensor

    def first(self, n: int) -> "Points":
        """The first n of them."""
        return Points._make(value[:n] for value in self)


class Held(NamedTuple):
    """What networks are judged by. No training sees it."""

    one_step: Points
    """Noise at t = 1 that goes to s = 0."""
    within: Points
    """Points on the path at a uniform t in (0, 1), which go to a uniform s in (0, t)."""
    velocity: Tensor
    """The exact velocity at `within` [n, D]."""
    noise: Tensor
    """[SAMPLES, D]; its first rows are those of `one_step`."""
    data: Tensor
    """[SAMPLES, D]."""
    spread: float
    """Root mean square distance of the data to its mean: the unit of errors."""


@functools.cache
def held(name: str, n: int = HELD, samples: int = SAMPLES) -> Held:
    """The points of a problem, the same for every network."""
    data, source = mixture(name), generator(0, 0, 0, f"held points of {name}")
    x0, _ = data.sample(samples, source)
    noise = torch.randn(x0.shape, generator=source, dtype=torch.float64)
    one, zero = torch.ones(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    start = noise[:n]
    one_step = Points(start, one, zero, data.solution(start, one, zero, steps=SOLUTION_STEPS))
    t, u = torch.rand(2, n, generator=source, dtype=torch.float64)
    alpha, beta, *_ = (value[:, None] for value in data.scales(t))
    other = torch.randn(start.shape, generator=source, dtype=torch.float64)
    x = alpha * data.sample(n, source)[0] + beta * other
    within = Points(x, t, u * t, data.solution(x, t, u * t, steps=SOLUTION_STEPS))
    spread = float((x0 - x0.mean(0)).square().sum(1).mean().sqrt())
    return Held(one_step, within, data.velocity(x, t), noise, x0, spread)


def configuration(name: str, seed: int, steps: int, **changes: Any) -> Config:
    """The setting from which one factor at a time is varied; changes: fields by their names, as "objective__p"."""
    config = Config(
        model=DiTConfig(
            input_size=1,
            patch_size=1,
            in_channels=DIMENSIONS[name],
            num_classes=0,
            hidden_size=64,
            depth=3,
            num_heads=2,
        ),
        objective=ObjectiveConfig(
            guidance_scale=1.0,
            guidance_decay_time=1.0,
            mix_ratio=1.0,
            label_drop=0.0,
            p=0.0,
            r_end=0.01,
            fm_fraction=0.5,
            sc_time=(0.8, 1.2),
            sc_end_time=(-2.0, 1.2),
        ),
        optim=OptimConfig(lr=2e-3, lr_schedule="cosine", ema_decay=0.995, ema_warmup=True),
        data=DataConfig(kind="latents"),
        run=RunConfig(device="cpu", check_quotient_every=0),
        steps=steps,
        batch_size=128,
        precision="fp32",
        seed=seed,
    )
    return override(config, {field.replace("__", "."): value for field, value in changes.items()})


def batch(data: Mixture, config: Config, step: int) -> Tensor:
    """Fresh data of a step, float32 [B, D, 1, 1], from the same draws whatever is trained."""
    x0, _ = data.sample(config.batch_size, generator(config.seed, step, 0, "mixture"))
    return x0.float()[:, :, None, None]


@torch.no_grad()
def solved(flow: SolutionFlow, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """A network's f(x, t, s), float64 [n, D]."""
    return flow.solution(x.float()[:, :, None, None], t.float(), s.float())[:, :, 0, 0].double()


@torch.no_grad()
def velocity(flow: SolutionFlow, x: Tensor, t: Tensor) -> Tensor:
    """A network's v(x, t), float64 [n, D]."""
    return flow.velocity(x.float()[:, :, None, None], t.float())[:, :, 0, 0].double()
