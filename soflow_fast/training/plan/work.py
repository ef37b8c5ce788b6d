"""What the parts of a step compute on one GPU, taken apart into blocks and the rest, and how often they pass over a
network."""

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from ...config.schema import Config
from ...ranks import flow_matching_samples
from ..consistency_target import ConsistencyTarget
from ..time_estimate import PHASES, count_step, priced
from .memory import alone

DEPTHS = (2, 3)
"""What a step takes with so many blocks gives what it takes with any number: each adds the same."""


class Work(NamedTuple):
    """What some operations take on one GPU."""

    gpu: float
    """Seconds."""
    host: float
    """Seconds of the host, where it dispatches everything."""
    launches: float

    def times(self, n: float) -> "Work":
        """The same n times."""
        return Work(*(n * value for value in self))


class PhaseWork(NamedTuple):
    """A part of a step on one micro-batch."""

    block: Work
    """Of each block."""
    rest: Work

    def whole(self, depth: int) -> Work:
        """Of all blocks and the rest."""
        return Work(*(depth * block + rest for block, rest in zip(self.block, self.rest, strict=True)))


_counted = lru_cache(maxsize=16)(count_step)


def phase_work(config: Config, gpu: str, size: int) -> dict[str, PhaseWork]:
    """The parts of a step on one GPU and a micro-batch of `size` images, from what each of `DEPTHS` takes."""
    config = replace(alone(config), batch_size=size, micro_batch=0)
    found = []
    for depth in DEPTHS:
        operations = _counted(replace(config, model=replace(config.dit, depth=depth)))
        found.append(priced(operations, gpu, size, "").phases)
    works = {}
    for name in PHASES:
        two, three = (Work(phases[name].gpu, phases[name].host, phases[name].launches) for phases in found)
        block = Work(*(b - a for a, b in zip(two, three, strict=True)))
        works[name] = PhaseWork(block, Work(*(a - DEPTHS[0] * b for a, b in zip(two, block, strict=True))))
    return works


def passes(config: Config, target: ConsistencyTarget, precision: str, size: int) -> dict[str, int]:
    """How often each part of a micro-batch of `size` images passes over a network."""
    objective = config.objective
    guided = (objective.guidance_scale > 1 or config.model.guidance_range) and config.model.conditional
    # A pair is both ends, unless one of them is the student's own output.
    own = target.kind == "increments" or (target.teacher == "student" and target.precision == precision)
    each = (1 if own else 2) * (flow_matching_samples(size, objective.flow_matching_fraction) < size)
    return {"guidance": int(bool(guided)), "student": 1, "target": each, "backward": 1}
