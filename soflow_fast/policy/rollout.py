"""Episodes of a policy in the environment of its task, chunk after chunk, and their returns."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.dataset import Normalisation
from ..data.demonstrations.episodes import environment_seed
from ..data.demonstrations.task import Task
from ..rng import generator

Chunks = Callable[[Tensor, Tensor], Tensor]
"""Normalised chunks [B, horizon, action_dim] of normalised observations [B, obs_size] and noise of their shape."""


@dataclass(frozen=True)
class Rollout:
    """What some episodes have come to."""

    returns: Tensor
    """Sums of rewards, float64 [episodes]."""
    observations: np.ndarray
    """float32 [episodes, steps + 1, obs_size]."""

    @property
    def mean(self) -> float:
        """The mean return."""
        return float(self.returns.mean())


def roll_out(
    task: Task,
    chunks: Chunks,
    normalisation: Normalisation,
    shape: tuple[int, int],
    executed: int,
    episodes: int,
    seed: int,
) -> Rollout:
    """Episodes of a policy, side by side: a chunk of actions is drawn, its first `executed` actions are taken, and the
    next chunk is drawn at what is then observed. The same seed gives the same starts and the same noise.

    shape: horizon and action_dim. Raises ConfigError where the task's package is not installed.
    """

    def act(observations: np.ndarray, step: int) -> np.ndarray:
        nonlocal ahead
        if step % executed == 0:
            seen = normalisation.normalised_observations(torch.from_numpy(observations))
            noise = torch.randn(episodes, *shape, generator=generator(seed, step, 0, "policy noise"))
            ahead = normalisation.actions(chunks(seen, noise)).numpy()
        return ahead[:, step % executed]

    ahead = np.empty(0)
    return _episodes(task, act, episodes, seed)


def roll_out_expert(task: Task, episodes: int, seed: int) -> Rollout:
    """The same episodes of the task's expert, undisturbed."""
    choices = [float(torch.rand((), generator=generator(seed, k, 0, "expert's choice"))) for k in range(episodes)]

    def act(observations: np.ndarray, step: int) -> np.ndarray:
        return np.stack([task.expert(one, choice) for one, choice in zip(observations, choices, strict=True)])

    return _episodes(task, act, episodes, seed)


def roll_out_random(task: Task, episodes: int, seed: int) -> Rollout:
    """The same episodes of actions that are uniform within their bounds."""
    low, high = torch.from_numpy(task.action_low), torch.from_numpy(task.action_high)

    def act(observations: np.ndarray, step: int) -> np.ndarray:
        drawn = torch.rand(episodes, len(low), generator=generator(seed, step, 0, "random actions"))
        return (low + (high - low) * drawn).numpy()

    return _episodes(task, act, episodes, seed)


def share_of_expert(reached: float, expert: float, random: float) -> float:
    """How much of the way from random actions to the expert a mean return is: 1 is the expert's, 0 that of chance.

    Returns are negative here, so that a plain quotient would call a worse one larger."""
    return (reached - random) / (expert - random)


def _episodes(task: Task, act: Callable[[np.ndarray, int], np.ndarray], episodes: int, seed: int) -> Rollout:
    environments: list[Any] = [task.environment() for _ in range(episodes)]
    starts = [environment_seed(seed, k, "episode") for k in range(episodes)]
    seen = [np.stack([one.reset(seed=start)[0] for one, start in zip(environments, starts, strict=True)])]
    returns = torch.zeros(episodes, dtype=torch.float64)
    for step in range(task.steps):
        actions = np.clip(act(seen[-1], step), task.action_low, task.action_high).astype(np.float32)
        results = [one.step(action) for one, action in zip(environments, actions, strict=True)]
        seen.append(np.stack([result[0] for result in results]))
        returns += torch.tensor([float(result[1]) for result in results], dtype=torch.float64)
    for one in environments:
        one.close()
    return Rollout(returns, np.stack(seen, 1))
