"""Demonstrations: chunks of the actions that were taken at observations, both normalised, as a data set."""

from pathlib import Path

import torch
from torch import Tensor

from ...errors import DataError
from ..dataset import Contents, Dataset, Normalisation
from .episodes import Episodes, record
from .tasks import TASKS, open_task

LEAST = 1e-6
"""Deviation, as a share of the largest size, up to which a number counts as constant, and is not divided by it: what
float32 makes of one."""


class Demonstrations(Dataset):
    """Chunks [1, horizon, action_dim] of the actions from each step on, and in the place of labels that step's
    observation [obs_size]. Both have mean 0 and deviation 1, by number; a chunk that passes the end of its episode
    repeats the last action."""

    mirrors = False
    copies = True

    def __init__(self, episodes: Episodes, horizon: int) -> None:
        normalisation = normalisation_of(episodes)
        self._actions = normalisation.normalised_actions(episodes.actions)
        self._observations = normalisation.normalised_observations(episodes.observations)
        self.labels = torch.zeros(len(episodes.ends), dtype=torch.int64)
        self._ends, self._ahead = episodes.ends, torch.arange(horizon)
        self.shape = (1, horizon, episodes.actions.shape[1])
        self.contents = Contents(episodes.kind, checksum=episodes.checksum, normalisation=normalisation)

    def read(self, index: Tensor, mirrored: Tensor | None = None) -> Tensor:
        assert mirrored is None
        steps = torch.minimum(index[:, None] + self._ahead, self._ends[index][:, None])
        return self._actions[steps][:, None]

    def given(self, index: Tensor) -> Tensor:
        return self._observations[index]


def normalisation_of(episodes: Episodes) -> Normalisation:
    """Means and deviations of the observations and actions, by number."""

    def moments(values: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
        deviation = values.double().std(0, correction=0)
        constant = deviation <= LEAST * values.double().abs().amax(0)
        deviation = torch.where(constant, torch.ones_like(deviation), deviation)
        return tuple(values.double().mean(0).tolist()), tuple(deviation.tolist())

    return Normalisation(*moments(episodes.observations), *moments(episodes.actions))


def open_demonstrations(path: str, horizon: int, seed: int) -> Demonstrations:
    """The demonstrations of a task by its name, recorded of its expert by `seed`, or of a LeRobot data set in a folder.

    Raises DataError for what is neither or damaged, ConfigError where a package is missing.
    """
    if path in TASKS:
        if Path(path).is_dir():
            raise DataError(f"--data {path}: is a task and a folder here; give ./{path} for the folder, or rename it")
        return Demonstrations(record(open_task(path), seed), horizon)
    if Path(path).is_dir():
        from .lerobot import read_lerobot

        return Demonstrations(read_lerobot(Path(path)), horizon)
    raise DataError(f"--data {path}: no task ({', '.join(TASKS)}) and no folder of a LeRobot data set")
