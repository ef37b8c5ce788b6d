"""Action policies: SoFlow on chunks of actions, given an observation. In this family time runs the other way.

The noise is at t = 0 and the action at t = 1 (`NOISE_AT_ZERO`), while the rest of the package has data at t = 0 and
noise at t = 1. `PolicyNetwork` turns one into the other, so that the engine trains these policies as it trains images.
"""

from .adapter import LeRobotPolicy
from .engine import PolicyNetwork
from .network import SoFlowPolicy, output_size, recommended_defaults
from .solution import (
    NOISE_AT_ZERO,
    combined_loss,
    consistency_loss,
    euler_parameterize,
    euler_sample,
    flow_matching_loss,
    interpolate,
    multi_step_sample,
    one_step_sample,
)

__all__ = [
    "NOISE_AT_ZERO",
    "LeRobotPolicy",
    "PolicyNetwork",
    "SoFlowPolicy",
    "combined_loss",
    "consistency_loss",
    "euler_parameterize",
    "euler_sample",
    "flow_matching_loss",
    "interpolate",
    "multi_step_sample",
    "one_step_sample",
    "output_size",
    "recommended_defaults",
]
