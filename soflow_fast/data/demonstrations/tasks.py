"""The tasks with an environment, by the names that `--data` of a policy takes."""

from .obstacle import Obstacle
from .pendulum import Pendulum
from .task import Task

TASKS = ("pendulum", "obstacle")


def open_task(name: str) -> Task:
    """A task by its name. Raises ValueError for an unknown one."""
    if name == "pendulum":
        return Pendulum()
    if name == "obstacle":
        return Obstacle()
    raise ValueError(f"the tasks are {', '.join(TASKS)}, got {name!r}")
