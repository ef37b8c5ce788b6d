"""What policies learn: of two good ways both and never their mean, in one call; the mean is what regression learns."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.baselines import behaviour_cloning
from benchmarks.studies import policies
from soflow_fast.config.presets import preset
from soflow_fast.config.schema import Config, PolicyConfig
from soflow_fast.policy import one_step_sample
from soflow_fast.rng import generator
from soflow_fast.training.state import TrainState
from soflow_fast.training.step import train_step

B = 128


def config(steps: int, **changes: object) -> Config:
    model = PolicyConfig(obs_size=1, action_dim=1, action_horizon=2, hidden_size=64, num_layers=2, executed=1)
    settings = {
        "precision": "fp32",
        "device": "cpu",
        "batch_size": B,
        "steps": steps,
        "optim.ema_decay": 0.99,
        "optim.lr": 8e-3,
    }
    return replace(preset("policy", **(settings | changes)), model=model)


def two_ways(step: int) -> tuple[Tensor, Tensor]:
    """Chunks (a, a) with a = 1 or -1, whatever is observed."""
    source = generator(0, step, 0, "two ways")
    sides = torch.randint(2, (B, 1, 1, 1), generator=source).float() * 2 - 1
    return sides.expand(B, 1, 2, 1), torch.rand(B, 1, generator=source)


def test_one_call_takes_one_of_two_ways_and_regression_their_mean():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        state = TrainState.build(config(300))
        while state.step < 300:
            train_step(state, *two_ways(state.step))
        cloned = TrainState.build(behaviour_cloning.configuration(config(60)))
        while cloned.step < 60:
            behaviour_cloning.step(cloned, *two_ways(cloned.step))
    finally:
        torch.set_num_threads(threads)
    observations = torch.rand(1000, 1, generator=generator(1, 0, 0, "observations"))
    noise = torch.randn(1000, 2, 1, generator=generator(1, 0, 0, "noise"))
    with torch.no_grad():
        drawn = one_step_sample(state.ema.network.policy, observations, noise)
    near = (drawn.abs() - 1).abs().amax((1, 2)) < 0.4
    together = drawn[:, 0, 0].sign() == drawn[:, 1, 0].sign()
    # A network that ignores its times, or a wrong target, leaves the mean or the noise: of standard normal noise 9 % of
    # the chunks are near one of the two ways.
    assert (near & together).float().mean() > 0.75
    assert 0.35 < (drawn[:, 0, 0] > 0).float().mean() < 0.65
    means = behaviour_cloning.chunks(cloned)(observations, noise)
    assert means.abs().max() < 0.4


@pytest.mark.slow
def test_one_call_passes_the_obstacle_where_behaviour_cloning_runs_into_it(monkeypatch: pytest.MonkeyPatch):
    """One seed of the study at two thirds of its steps, and of fewer episodes."""
    pytest.importorskip("gymnasium")
    monkeypatch.setattr(policies, "EPISODES", 50)
    threads = torch.get_num_threads()
    try:
        rows = [row for method in ("SoFlow", "behaviour cloning") for row in policies.run("obstacle", method, 0, 2000)]
    finally:
        torch.set_num_threads(threads)
    share = {row["method"]: row["share"] for row in rows}
    assert share["SoFlow, 1 call"] > 0.9
    assert share["SoFlow, 2 calls"] > 0.95
    assert share["behaviour cloning, mean squared error"] < 0.85
