"""Behaviour cloning by the mean squared error: the same network gives a chunk of actions at once, from no noise.

Where several actions are good it learns their mean, as any regression does. It is the engine's flow-matching step with
the noise taken away: at x_1 = 0 and t = 1 the input is 0 and the velocity is minus the actions.
"""

from dataclasses import replace

import torch
from torch import Tensor

from soflow_fast.config.schema import Config
from soflow_fast.policy.rollout import Chunks
from soflow_fast.training.state import TrainState
from soflow_fast.training.step import Draws, train_step


def configuration(config: Config) -> Config:
    """That of a policy with the plain squared error, and everything else as it is."""
    return replace(config, objective=replace(config.objective, kind="flow-matching", p=0.0))


def step(state: TrainState, x0: Tensor, y: Tensor) -> dict[str, Tensor]:
    """One update on chunks x0 [B, 1, horizon, action_dim] at observations y [B, obs_size]."""
    ones = torch.ones(len(x0))
    never = torch.zeros(len(x0), dtype=torch.bool)
    return train_step(state, x0, y, draws=Draws(torch.zeros_like(x0), ones, ones, ones, never, len(x0)))


def chunks(state: TrainState) -> Chunks:
    """The chunks that the averaged network gives, whatever the noise."""
    policy = state.ema.network.policy

    @torch.no_grad()
    def mean(observations: Tensor, noise: Tensor) -> Tensor:
        at_noise = torch.zeros(len(observations))  # of a policy, whose noise is at t = 0
        return policy(torch.zeros_like(noise), at_noise, at_noise, observations)

    return mean
