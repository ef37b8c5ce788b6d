"""Pass an obstacle on its left or on its right: from the same place both are good, and their mean runs into it."""

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from .task import Task, gymnasium

if TYPE_CHECKING:
    from PIL.Image import Image

STEPS = 40
SPEED = 0.05
"""Length of a step at an action of 1."""
CENTRE, RADIUS = np.array([0.0, 0.4]), 0.2
GOAL = np.array([0.0, 1.0])
PASSAGE = 0.4
"""How far beside the obstacle's centre the expert passes it."""
START = 0.02
"""Starts are in [-START, START] beside the middle, on the line below the obstacle."""


class Obstacle(Task):
    """Observations are the place x, y of a robot; the action is its velocity in [-1, 1] each; the reward is minus the
    distance to the goal in each of 40 steps. A robot that has run into the obstacle stays there."""

    name = "obstacle"
    steps = STEPS
    shaken = 0.1
    obs_size = 2
    action_low = np.array([-1.0, -1.0], dtype=np.float32)
    action_high = np.array([1.0, 1.0], dtype=np.float32)

    def environment(self) -> Any:
        return _environment_class()()

    def expert(self, observation: np.ndarray, choice: float) -> np.ndarray:
        """Towards a passage beside the obstacle and from there to the goal: on the left for a `choice` below one half,
        else on the right."""
        place = np.asarray(observation, dtype=np.float64)
        side = -1.0 if choice < 0.5 else 1.0
        target = np.array([side * PASSAGE, CENTRE[1]]) if place[1] < CENTRE[1] - SPEED / 2 else GOAL
        way = (target - place) / SPEED
        return (way / max(1.0, float(np.linalg.norm(way)))).astype(np.float32)

    def picture(self, observations: np.ndarray, size: int = 160) -> "Image":
        from PIL import Image, ImageDraw

        def at(place: np.ndarray) -> tuple[float, float]:
            return size / 2 + float(place[0]) * size * 0.75, size * (0.92 - 0.75 * float(place[1]))

        image = Image.new("RGB", (size, size), "white")
        draw, pixel = ImageDraw.Draw(image), size / 40
        for place, radius, colour in (
            (CENTRE, RADIUS * size * 0.75, (120, 120, 120)),
            (GOAL, 2 * pixel, (80, 160, 90)),
            (observations[-1], 1.5 * pixel, (190, 60, 50)),
        ):
            x, y = at(place)
            draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)
        if len(observations) > 1:
            draw.line([at(place) for place in observations], fill=(190, 60, 50), width=2)
        return image


def moved(place: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, bool]:
    """The place after an action, and whether the robot has run into the obstacle, where it then stays."""
    there = place + SPEED * np.clip(action, -1.0, 1.0)
    return there, bool(np.linalg.norm(there - CENTRE) < RADIUS)


@functools.cache
def _environment_class() -> Any:
    """The class of the environment, which can only be made where gymnasium is installed."""
    gym = gymnasium(Obstacle.name)

    class ObstacleEnv(gym.Env):
        observation_space = gym.spaces.Box(-4.0, 4.0, (2,), np.float32)
        action_space = gym.spaces.Box(Obstacle.action_low, Obstacle.action_high)

        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
            super().reset(seed=seed)
            self.place, self.stuck, self.done = np.array([self.np_random.uniform(-START, START), 0.0]), False, 0
            return self.place.astype(np.float32), {}

        def step(self, action: np.ndarray) -> Any:
            if not self.stuck:
                self.place, self.stuck = moved(self.place, np.asarray(action, dtype=np.float64))
            self.done += 1
            reward = -float(np.linalg.norm(self.place - GOAL))
            return self.place.astype(np.float32), reward, False, self.done >= STEPS, {"stuck": self.stuck}

    return ObstacleEnv
