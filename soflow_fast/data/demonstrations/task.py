"""What a control task is: an environment of gymnasium (extra `policy`), a scripted expert, a picture of its state."""

import abc
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image


class Task(abc.ABC):
    """A task whose episodes all have the same number of steps. What is random is a function of seeds."""

    name: str
    steps: int
    """In an episode."""
    shaken: float
    """Deviation of what disturbs each action of the expert while it is recorded, in units of half the range of actions.

    The recorded action is the one that it meant, so the episodes show how to come back from what a policy will err."""
    obs_size: int
    action_low: np.ndarray
    """Bounds of an action, float32 [action_dim] each."""
    action_high: np.ndarray

    @abc.abstractmethod
    def environment(self) -> Any:
        """A `gymnasium.Env` of the task. Raises ConfigError where gymnasium is not installed."""

    @abc.abstractmethod
    def expert(self, observation: np.ndarray, choice: float) -> np.ndarray:
        """The action, float32 [action_dim], of the scripted expert at an observation [obs_size].

        choice: in [0, 1), the same for a whole episode: which of several good ways the expert takes.
        """

    @abc.abstractmethod
    def picture(self, observations: np.ndarray, size: int = 160) -> "Image":
        """The state behind the last of the observations [n, obs_size] of an episode so far, as an RGB image."""


def gymnasium(task: str) -> Any:
    """The package. Raises ConfigError where it is not installed."""
    try:
        import gymnasium as found  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError(f"the task {task} needs gymnasium: pip install 'soflow-fast[policy]'") from None
    return found
