"""A trained policy as LeRobot's code calls one: `select_action` gives an action at a time, `reset` begins an episode.

It has the methods of lerobot's `PreTrainedPolicy` that acting needs, and imports nothing of that package.
"""

from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..data.dataset import Normalisation
from ..data.demonstrations.lerobot import OBSERVATIONS
from ..rng import generator
from .network import SoFlowPolicy
from .solution import euler_sample, multi_step_sample


class LeRobotPolicy(nn.Module):
    """Actions of a `SoFlowPolicy` in the units of its demonstrations, of which it takes chunk after chunk.

    A chunk goes from noise at t = 0 to actions at t = 1 (`NOISE_AT_ZERO`). Observations are not normalised before: it
    does so itself, so that processors of lerobot must not.
    """

    def __init__(
        self,
        policy: SoFlowPolicy,
        normalisation: Normalisation,
        executed: int,
        steps: int = 1,
        seed: int = 0,
        *,
        solves: bool = True,
    ) -> None:
        """executed: actions of a chunk that are given out before the next one is drawn. steps: calls for a chunk, from
        noise at t = 0 to actions at t = 1 (`NOISE_AT_ZERO`). seed: of the noise. solves: False of a policy that has
        learned velocities alone, whose steps are Euler's.

        Raises ValueError for numbers that do not fit the policy.
        """
        super().__init__()
        config = policy.config
        if not 1 <= executed <= config.action_horizon:
            raise ValueError(
                f"executed must be from 1 to {config.action_horizon}, the actions in a chunk, got {executed}"
            )
        if type(steps) is not int or steps < 1:
            raise ValueError(f"steps must be a whole number of at least 1, got {steps!r}")
        sizes = len(normalisation.observation_mean), len(normalisation.action_mean)
        if sizes != (config.obs_size, config.action_dim):
            raise ValueError(f"normalisation is of sizes {sizes}, the policy of {config.obs_size, config.action_dim}")
        self.policy, self.normalisation = policy, normalisation
        self.executed, self.steps, self.seed, self.solves = executed, steps, seed, solves
        self._episode, self._drawn = -1, 0
        self._queue: deque[Tensor] = deque()
        self.reset()

    def reset(self) -> None:
        """Begin an episode: what is left of the last chunk is dropped."""
        self._queue.clear()
        self._episode, self._drawn = self._episode + 1, 0

    @torch.no_grad()
    def predict_action_chunk(self, batch: Mapping[str, Tensor]) -> Tensor:
        """A chunk of actions [B, horizon, action_dim], from noise at t = 0 to actions at t = 1 (`NOISE_AT_ZERO`).

        batch: `observation.state` and, where the demonstrations have it, `observation.environment_state`, [B, numbers]
        each; other entries are not looked at. Raises ValueError for what does not fit.
        """
        known = [batch[name] for name in OBSERVATIONS if name in batch]
        if not known:
            raise ValueError(f"batch must hold {' or '.join(OBSERVATIONS)}, got {', '.join(batch) or 'nothing'}")
        weight, config = next(self.policy.parameters()), self.policy.config
        observations = torch.cat([value.to(weight) for value in known], -1)
        if observations.dim() != 2 or observations.shape[1] != config.obs_size:
            raise ValueError(f"observations must be [B, {config.obs_size}], got {list(observations.shape)}")
        shape = len(observations), config.action_horizon, config.action_dim
        source = generator(self.seed, self._drawn, self._episode, "policy noise")
        self._drawn += 1
        noise = torch.randn(shape, generator=source).to(weight)
        seen = self.normalisation.normalised_observations(observations)
        draw = multi_step_sample if self.solves else euler_sample
        return self.normalisation.actions(draw(self.policy, seen, noise, self.steps))

    def select_action(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The next action [B, action_dim], of the chunk in hand or of a new one at what is observed now. batch: as for
        `predict_action_chunk`; a chunk begins with noise at t = 0 (`NOISE_AT_ZERO`)."""
        if not self._queue:
            self._queue.extend(self.predict_action_chunk(batch)[:, : self.executed].unbind(1))
        return self._queue.popleft()
