"""Small training states of several ranks."""

from typing import Any

import torch

from soflow_fast import TrainState
from soflow_fast.config.schema import RunConfig
from soflow_fast.launch import Launch
from soflow_fast.training.parallel import Parallel, join
from tests.states import build

CHANGES: dict[str, Any] = {"model.patch_size": 1, "objective.teacher": "ema", "batch_size": 24}
"""With patches of one pixel the last bias is one number: a rank of two has none of it. The eleven rows of labels are
not cut evenly. And there is a teacher to be kept."""


def joined(launch: Launch, kind: str) -> Parallel:
    return join(launch, RunConfig(parallel=kind, shard_ranks=2), torch.device("cpu"))  # type: ignore[arg-type]


def state_of(parallel: Parallel, **changes: Any) -> TrainState:
    """The state of one of several ranks before its first step."""
    return TrainState.build(build(**{**CHANGES, "parallel": parallel.kind, **changes}).config, parallel=parallel)


def fill(state: TrainState, number: float) -> None:
    """Something else in every step."""
    with torch.no_grad():
        for flow in (state.flow, state.ema):
            for parameter in flow.parameters():
                parameter.fill_(number)
    for parameter in state.flow.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
