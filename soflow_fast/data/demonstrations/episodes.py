"""Episodes: observations with the actions that were taken at them, recorded of a task's expert."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...rng import generator
from .task import Task

RECORDED = 200
"""Episodes of the expert that a policy learns from."""
VERSION = 1
"""Of tasks, experts and recording: a change of what they record raises it."""


@dataclass(frozen=True)
class Episodes:
    """Steps of episodes, one after the other."""

    observations: Tensor
    """float32 [steps, obs_size]."""
    actions: Tensor
    """float32 [steps, action_dim], each taken at the observation of the same number."""
    ends: Tensor
    """int64 [steps]: for each step the number of the last one of its episode."""
    checksum: str
    kind: str
    """In words."""


def environment_seed(seed: int, episode: int, purpose: str) -> int:
    """What an environment is reset with for an episode, below 2^31."""
    return int(torch.randint(2**31 - 1, (), generator=generator(seed, episode, 0, purpose)))


def record(task: Task, seed: int, episodes: int = RECORDED) -> Episodes:
    """Episodes of the expert of a task, the same for the same seed. Raises ConfigError without gymnasium."""
    environment, half = task.environment(), (task.action_high - task.action_low) / 2
    seen, taken, ends = [], [], []
    for episode in range(episodes):
        source = generator(seed, episode, 0, "demonstrations")
        choice = float(torch.rand((), generator=source))
        shake = task.shaken * torch.randn(task.steps, len(half), generator=source).numpy() * half
        observation, _ = environment.reset(seed=environment_seed(seed, episode, "demonstrated episode"))
        for disturbance in shake:
            action = task.expert(observation, choice)
            seen.append(observation)
            taken.append(action)
            disturbed = np.clip(action + disturbance, task.action_low, task.action_high).astype(np.float32)
            observation = environment.step(disturbed)[0]
        ends += [len(seen) - 1] * task.steps
    environment.close()
    recipe = f"{task.name} {VERSION} {seed} {episodes} {task.shaken}"  # the last bits of sines differ between machines
    return Episodes(
        torch.from_numpy(np.stack(seen).astype(np.float32)),
        torch.from_numpy(np.stack(taken).astype(np.float32)),
        torch.tensor(ends),
        hashlib.sha256(recipe.encode()).hexdigest(),
        f"{episodes} episodes of the expert of {task.name}",
    )
