"""Policies of a run: how they act in the environment of their task, on the way, at the end and afterwards."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config.schema import Config, PolicyConfig
from ..data.demonstrations.task import Task
from ..data.demonstrations.tasks import TASKS, open_task
from ..data.identity import Identity
from ..errors import CheckpointError, ConfigError
from ..flow import SolutionFlow
from ..policy.adapter import LeRobotPolicy
from ..policy.rollout import Chunks, Rollout, roll_out, roll_out_expert, roll_out_random, share_of_expert
from ..policy.solution import euler_sample, multi_step_sample
from ..rng import generator
from ..sampling.solving import usual_calls
from ..training.state import TrainState
from .checkpoint import load_with_data
from .images import npy

EPISODES = 100
"""Of an evaluation, if it is not said how many."""
SHOWN = 100
"""Chunks that stand for samples where there is no environment."""
FRAME_SECONDS = 0.05
EVERY = 2
"""Of how many steps of an episode one is shown."""


def task_of(config: Config) -> Task | None:
    """The task that a policy was demonstrated; None: its demonstrations are a data set, without an environment."""
    return open_task(config.data.path) if config.data.path in TASKS else None


def chunks_by(flow: SolutionFlow, nfe: int) -> Chunks:
    """What draws chunks by a policy with `nfe` calls each: of one that solves over equal segments of the times, of one
    of flow matching by Euler steps."""
    policy, draw = flow.network.policy, multi_step_sample if flow.solves else euler_sample

    def chunks(observations: Tensor, noise: Tensor) -> Tensor:
        weight = next(policy.parameters())
        with torch.no_grad():
            return draw(policy, observations.to(weight), noise.to(weight), nfe).cpu()

    return chunks


class Acting:
    """Episodes of a policy in its environment."""

    def __init__(self, flow: SolutionFlow, config: Config, data: Identity) -> None:
        """data: has the normalisation that the policy was trained with."""
        assert isinstance(config.model, PolicyConfig) and data.normalisation is not None
        self.flow, self.model, self.task, self.normalisation = flow, config.model, task_of(config), data.normalisation

    def rollout(self, nfe: int, episodes: int, seed: int) -> Rollout:
        """Episodes with chunks of `nfe` calls each. Raises ConfigError where the task's package is not installed."""
        assert self.task is not None
        shape = self.model.action_horizon, self.model.action_dim
        chunks = chunks_by(self.flow, nfe)
        return roll_out(self.task, chunks, self.normalisation, shape, self.model.executed, episodes, seed)

    def figures(self, nfe: int, episodes: int, seed: int) -> dict[str, float]:
        """Mean return of episodes, that of the expert and of random actions in the same, and the share between them."""
        assert self.task is not None
        reached = self.rollout(nfe, episodes, seed).mean
        expert, random = (act(self.task, episodes, seed).mean for act in (roll_out_expert, roll_out_random))
        share = share_of_expert(reached, expert, random)
        return {"return": reached, "expert": expert, "random": random, "share": share}

    def gif(self, seed: int, nfe: int = 0) -> bytes:
        """An episode with chunks of `nfe` calls (0: as many as usual), as the bytes of a GIF."""
        assert self.task is not None
        return episode_gif(self.task, self.rollout(nfe or usual_calls(self.flow), 1, seed).observations[0])


def episode_gif(task: Task, observations: np.ndarray) -> bytes:
    """The states behind the observations [steps + 1, obs_size] of an episode, as the bytes of a GIF."""
    first, *others = [task.picture(observations[:end]) for end in range(1, len(observations) + 1, EVERY)]
    buffer, milliseconds = io.BytesIO(), round(1000 * FRAME_SECONDS * EVERY)
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=milliseconds, loop=0)
    return buffer.getvalue()


def line(nfe: int, figures: dict[str, float], episodes: int) -> str:
    """Figures of episodes as a line."""
    calls = f"{nfe} call{'s' if nfe > 1 else ''} a chunk"
    return (
        f"{calls}: mean return {figures['return']:.2f} of {episodes} episodes, the expert {figures['expert']:.2f}, "
        f"random actions {figures['random']:.2f}: {100 * figures['share']:.1f} % of the way"
    )


class Episodes:
    """What `samples.Grids` is for images: an episode of the averaged policy as a GIF, with the same start and noise
    every time; chunks in .npy where there is no environment."""

    def __init__(self, state: TrainState, data: Identity) -> None:
        self.acting, self.seed = Acting(state.ema, state.config, data), 0

    def draw(self) -> tuple[str, bytes, None]:
        """The ending of a file and its content."""
        if self.acting.task is not None:
            return "gif", self.acting.gif(self.seed), None
        model, source = self.acting.model, generator(self.seed, 0, 0, "policy noise")
        noise = torch.randn(SHOWN, model.action_horizon, model.action_dim, generator=source)
        chunks = chunks_by(self.acting.flow, usual_calls(self.acting.flow))
        return "npy", npy(self.acting.normalisation.actions(chunks(torch.zeros(SHOWN, model.obs_size), noise))), None


class Returns:
    """What `samples.Evaluations` is for images: the returns of episodes of the averaged policy."""

    unit = "episodes"

    def __init__(self, state: TrainState, episodes: Episodes) -> None:
        run = state.config.run
        self.state, self.acting = state, episodes.acting
        self.samples = run.eval_samples or EPISODES
        if run.eval_every and not self.wanted:
            what = f"a policy of {', '.join(TASKS)} alone has an environment to act in"
            raise ConfigError(f"--eval-every {run.eval_every}: {what}")

    @property
    def wanted(self) -> bool:
        """Whether there is an environment to act in."""
        return self.acting.task is not None

    def on_the_way(self) -> tuple[str, dict[int, dict[str, float]]]:
        """The figures of chunks of as few calls as usual, as a line and by the number of calls."""
        nfe = usual_calls(self.state.ema)
        text, figures = self.at(nfe)
        return text, {nfe: figures}

    def at(self, nfe: int) -> tuple[str, dict[str, float]]:
        """The figures of chunks of `nfe` calls, as a line and by name."""
        figures = self.acting.figures(nfe, self.samples, seed=0)
        return line(nfe, figures, self.samples), figures

    def about(self) -> dict[str, Any]:
        """What stands beside the figures in evaluation.json."""
        assert self.acting.task is not None
        return {"task": self.acting.task.name, "episodes": self.samples}


def load_policy(
    source: str | os.PathLike, device: str | torch.device = "cpu", *, steps: int | None = None, seed: int = 0
) -> LeRobotPolicy:
    """The averaged policy of a run, checkpoint or exported directory, which gives an action at a time.

    Its chunks go from noise at t = 0 to actions at t = 1 (`policy.NOISE_AT_ZERO`). steps: calls for a chunk; None: one,
    or ten Euler steps of a policy of flow matching. seed: of the noise. Raises CheckpointError as `load` does, and for
    what is no policy.
    """
    flow, config, data = policy_of(source, device)
    steps = usual_calls(flow) if steps is None else steps
    assert isinstance(config.model, PolicyConfig) and data.normalisation is not None
    policy, solves = flow.network.policy, flow.solves
    return LeRobotPolicy(policy, data.normalisation, config.model.executed, steps, seed, solves=solves)


def policy_of(source: str | os.PathLike, device: str | torch.device) -> tuple[SolutionFlow, Config, Identity]:
    """A policy's flow, configuration and data. Raises CheckpointError."""
    flow, config, data = load_with_data(source, device)
    if not isinstance(config.model, PolicyConfig):
        raise CheckpointError(f"{source}: is no policy, its network is of the kind {config.model.kind}")
    if data is None or data.normalisation is None:
        raise CheckpointError(f"{source}: does not say how observations and actions are normalised")
    return flow, config, data


def gif_place(run: Path, given: str | None) -> Path | None:
    """Where the GIF of an episode goes: where it is said, else among the samples of a run directory; None: nowhere."""
    if given is not None:
        return Path(given)
    return run / "samples" / "episode.gif" if (run / "samples").is_dir() else None
