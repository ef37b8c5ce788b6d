"""Swing a pendulum up and hold it there: gymnasium's `Pendulum-v1`, whose motor is too weak to lift it at once."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from .task import Task, gymnasium

if TYPE_CHECKING:
    from PIL.Image import Image

GRAVITY = 15.0
"""3 g / (2 l) in the environment's equation of motion, w' = 15 sin a + 3 u, where the angle a is 0 upright."""
PUMP = 1.0
"""Torque for each unit of energy that is missing."""
CAUGHT = 0.35
"""Angle, in radians, from which on the expert holds the pendulum: the motor holds it up to 0.41."""
HOLD = (10.0, 2.5)
"""Torque for each unit of angle and of angular velocity."""


class Pendulum(Task):
    """Observations are cos a, sin a and the angular velocity; the action is a torque; the reward is
    -(a^2 + 0.1 w^2 + 0.001 u^2) in each of 200 steps, a being 0 upright."""

    name = "pendulum"
    steps = 200
    shaken = 0.3
    obs_size = 3
    action_low = np.array([-2.0], dtype=np.float32)
    action_high = np.array([2.0], dtype=np.float32)

    def environment(self) -> Any:
        return gymnasium(self.name).make("Pendulum-v1")

    def expert(self, observation: np.ndarray, choice: float) -> np.ndarray:
        """The torque that brings the energy to that of the upright pendulum (Astrom and Furuta 2000), and, once it is
        near, a linear law that holds it there. `choice` has no part in it."""
        cosine, sine, speed = (float(value) for value in observation)
        angle = math.atan2(sine, cosine)
        if abs(angle) < CAUGHT and abs(speed) < 4.0:
            torque = -HOLD[0] * angle - HOLD[1] * speed
        else:
            missing = GRAVITY - (speed**2 / 2 + GRAVITY * cosine)
            torque = PUMP * missing * (1.0 if speed >= 0 else -1.0)
        return np.clip(np.array([torque], dtype=np.float32), self.action_low, self.action_high)

    def picture(self, observations: np.ndarray, size: int = 160) -> "Image":
        from PIL import Image, ImageDraw

        cosine, sine, _ = observations[-1]
        image = Image.new("RGB", (size, size), "white")
        draw, middle, length = ImageDraw.Draw(image), size / 2, size * 0.38
        end = middle - length * float(sine), middle - length * float(cosine)
        draw.line([(middle, middle), end], fill=(190, 60, 50), width=max(2, size // 16))
        draw.ellipse(
            [end[0] - size / 20, end[1] - size / 20, end[0] + size / 20, end[1] + size / 20], fill=(190, 60, 50)
        )
        draw.ellipse([middle - 4, middle - 4, middle + 4, middle + 4], fill="black")
        return image
