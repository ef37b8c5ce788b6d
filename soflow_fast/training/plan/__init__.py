"""A step on many GPUs that are not here: memory, bytes over links and time, by arithmetic from stated rates."""

from .planning import Cluster, Plan, peak_of_rank, plan
from .step_time import PhasePlan

__all__ = ["Cluster", "PhasePlan", "Plan", "peak_of_rank", "plan"]
