"""From noise to the data along a list of times: by solution steps with new noise or without, or by the velocity."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from numbers import Integral
from typing import get_args

import torch
from torch import Tensor

from ..config.schema import SamplingMethod, shown
from ..flow import SolutionFlow, per_sample
from .guidance import scales

EULER_CALLS = 10
"""Network calls of each sample that goes along the velocity, where their number is not said: one would be the mean."""


def whole(name: str, value: int, least: int) -> int:
    """A whole number of at least `least`. Raises ValueError naming it."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {shown(value)}")
    return int(value)


def usual_calls(flow: SolutionFlow, method: str | None = None) -> int:
    """The network calls of each sample of a flow, where their number is not said. method: None: the flow's own.

    Raises ValueError as `checked_method` does.
    """
    return EULER_CALLS if checked_method(method, flow) == "euler" else 1


def checked_times(nfe: int | None, times: Sequence[float] | None, usual: int = 1) -> tuple[float, ...]:
    """The times t_0 = 1 > t_1 > ... > 0 of the network calls, after the last of which comes time 0.

    nfe: how many they are; None: as many as `times` has, or `usual`. times: None: they are evenly spaced.

    Raises ValueError.
    """
    if nfe is not None:
        nfe = whole("nfe", nfe, 1)
    if times is None:
        count = nfe or usual
        return tuple(1 - k / count for k in range(count))
    try:
        found = tuple(float(t) for t in times)
    except (TypeError, ValueError):
        raise ValueError(f"times must be numbers, got {shown(times)}") from None
    if nfe is not None and len(found) != nfe:
        raise ValueError(f"times must hold one for each of {nfe} network calls, got {shown(list(found))}")
    if not found or found[0] != 1 or not all(a > b for a, b in pairwise((*found, 0.0))):
        raise ValueError(f"times must begin with 1 and fall, each above 0, got {shown(list(found))}")
    return found


def checked_method(method: str | None, flow: SolutionFlow) -> SamplingMethod:
    """A method that is one, and fits a flow; None: the flow's own. Raises ValueError."""
    if method is None:
        return "renoise" if flow.solves else "euler"
    for known in get_args(SamplingMethod):
        if method == known:
            if method != "euler" and not flow.solves:
                raise ValueError(f"method must be euler, got {method!r}: the flow was trained by {flow.objective}")
            return known
    raise ValueError(f"method must be one of {', '.join(get_args(SamplingMethod))}, got {shown(method)}")


def noise_count(times: Sequence[float], method: SamplingMethod) -> int:
    """How many tensors of noise `solve` asks for."""
    return len(times) if method == "renoise" else 1


def solve(
    flow: SolutionFlow,
    noise: Callable[[int], Tensor],
    times: Sequence[float],
    method: SamplingMethod,
    labels: Tensor | None,
    guidance: float | None = None,
) -> Tensor:
    """Samples [B, C, H, W] from one network call at each of the times; at t_k, with t_n = 0 after the last:

    | method | x at t_{k+1} |
    |---|---|
    | "renoise" | alpha x_0 + beta noise_{k+1} at t_{k+1}, of x_0 = f(x, t_k, 0) |
    | "consecutive" | f(x, t_k, t_{k+1}) |
    | "euler" | x + (t_{k+1} - t_k) v(x, t_k) |

    noise: gives standard normal noise number k, for k below `noise_count`, [B, C, H, W]. guidance: as
    `chosen_guidance` gives it.
    """
    x = noise(0)
    w = scales(flow, guidance, labels, x)
    for k, now in enumerate(times):
        t, after = (_filled(x, value) for value in (now, times[k + 1] if k + 1 < len(times) else 0.0))
        if method == "euler":
            x = x + per_sample(after - t, x) * flow.velocity(x, t, labels, w)
        elif method == "consecutive":
            x = flow.solution(x, t, after, labels, w)
        else:
            x = flow.solution(x, t, torch.zeros_like(t), labels, w)
            if k + 1 < len(times):
                x = flow.point(x, noise(k + 1), after)[0]
    return x


def _filled(x: Tensor, value: float) -> Tensor:
    return torch.full((len(x),), value, device=x.device, dtype=x.dtype)
