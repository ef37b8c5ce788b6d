"""`policy.rollout`: receding horizons, the same starts for all, and shares, in an environment of our own."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from soflow_fast.data.dataset import Normalisation
from soflow_fast.data.demonstrations.task import Task
from soflow_fast.policy.rollout import roll_out, roll_out_expert, roll_out_random, share_of_expert

STEPS = 7


class Line:
    """A point on a line that an action moves; the reward is the action, and all actions are noted."""

    taken: list[float]

    def reset(self, seed: int) -> Any:
        self.place, self.step_number, self.taken = float(seed % 5), 0, []
        return np.array([self.place, 100.0], dtype=np.float32), {}

    def step(self, action: np.ndarray) -> Any:
        assert action.dtype == np.float32 and action.shape == (1,)
        self.taken.append(float(action[0]))
        self.place += float(action[0])
        self.step_number += 1
        observation = np.array([self.place, 100.0], dtype=np.float32)
        return observation, float(action[0]), False, self.step_number == STEPS, {}

    def close(self) -> None:
        pass


class LineTask(Task):
    name, steps, shaken, obs_size = "line", STEPS, 0.0, 2
    action_low, action_high = np.array([-1.0], dtype=np.float32), np.array([3.0], dtype=np.float32)

    def __init__(self) -> None:
        self.made: list[Line] = []

    def environment(self) -> Any:
        self.made.append(Line())
        return self.made[-1]

    def expert(self, observation: np.ndarray, choice: float) -> np.ndarray:
        return np.array([1.0 if choice < 0.5 else 2.0], dtype=np.float32)

    def picture(self, observations: np.ndarray, size: int = 160) -> Any:
        raise NotImplementedError


UNITS = Normalisation((2.0, 100.0), (4.0, 1.0), (1.0,), (2.0,))


def test_a_chunk_is_executed_in_part_and_the_next_drawn_at_what_is_seen_then():
    seen: list[Tensor] = []

    def chunks(observations: Tensor, noise: Tensor) -> Tensor:
        seen.append(observations)
        assert noise.shape == (2, 4, 1)
        return torch.tensor([0.0, 0.25, 0.5, 9.0])[None, :, None].expand(2, -1, -1)

    task = LineTask()
    found = roll_out(task, chunks, UNITS, (4, 1), executed=3, episodes=2, seed=0)
    # In the units of the task 1, 1.5, 2 of each chunk: (0, 0.25, 0.5) times 2 plus 1. The fourth is never executed.
    assert task.made[0].taken == [1, 1.5, 2, 1, 1.5, 2, 1]
    assert len(seen) == 3
    starts = found.observations[:, 0, 0]
    for k, moved in enumerate((0, 4.5, 9)):
        wanted = torch.from_numpy((starts + moved - 2) / 4)
        torch.testing.assert_close(seen[k], torch.stack([wanted, torch.zeros(2)], 1))
    assert found.returns.tolist() == [10, 10] and found.observations.shape == (2, STEPS + 1, 2)
    np.testing.assert_allclose(found.observations[:, -1, 0], starts + 10)


def test_actions_stay_within_their_bounds():
    task = LineTask()
    roll_out(task, lambda observations, noise: 100 * noise, UNITS, (1, 1), executed=1, episodes=3, seed=0)
    taken = [action for one in task.made for action in one.taken]
    assert min(taken) == -1 and max(taken) == 3


def test_all_act_from_the_same_starts_and_the_same_seed_gives_the_same():
    def chunks(observations: Tensor, noise: Tensor) -> Tensor:
        return noise / 4

    ways = [
        roll_out(LineTask(), chunks, UNITS, (2, 1), 1, 8, seed=3),
        roll_out(LineTask(), chunks, UNITS, (2, 1), 1, 8, seed=3),
        roll_out_expert(LineTask(), 8, seed=3),
        roll_out_random(LineTask(), 8, seed=3),
    ]
    for way in ways:
        assert np.array_equal(way.observations[:, 0], ways[0].observations[:, 0])
    assert torch.equal(ways[0].returns, ways[1].returns) and not torch.equal(ways[0].returns, ways[3].returns)
    other = roll_out(LineTask(), chunks, UNITS, (2, 1), 1, 8, seed=4)
    assert not np.array_equal(other.observations[:, 0], ways[0].observations[:, 0])
    assert set(ways[2].returns.tolist()) == {7.0, 14.0}  # the choice of an episode holds for all of it
    assert len(set(ways[3].returns.tolist())) == 8


def test_the_share_is_between_chance_and_the_expert():
    assert share_of_expert(-100, expert=-100, random=-1100) == 1
    assert share_of_expert(-1100, expert=-100, random=-1100) == 0
    assert share_of_expert(-150, expert=-100, random=-1100) == pytest.approx(0.95)
    assert share_of_expert(-50, expert=-100, random=-1100) > 1
