"""The path of a chunk of actions, its solution function, the two losses and sampling, without an engine.

Time runs from the noise, t = 0, to the action, t = 1 (`NOISE_AT_ZERO`): x_0 is noise and x_1 the action. The engine
trains with the weights, schedules and quotient of the paper (`objective`); these are the plain forms.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Policy = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""F(x_t, t, s, observations), such as a `SoFlowPolicy`, with the noise at t = 0 (`NOISE_AT_ZERO`)."""

NOISE_AT_ZERO = True
"""Whether the noise is at t = 0 and the action at t = 1, as everywhere in `soflow_fast.policy`. The rest of the package
has data at t = 0 and noise at t = 1: its t is 1 - t here, and its velocity has the other sign."""


def interpolate(x_0: Tensor, x_1: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x_0 + t x_1, between the noise x_0 at t = 0 and the action x_1 at t = 1 (`NOISE_AT_ZERO`), whose
    velocity is x_1 - x_0. x_0, x_1: [B, horizon, dim]; t: [B]. Raises ValueError for shapes that do not fit."""
    _check_alike("x_1", x_1, x_0)
    t = _times("t", t, x_0)
    return (1 - t) * x_0 + t * x_1


def euler_parameterize(x_t: Tensor, f_theta: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The solution function f(x_t, t, s) = x_t + (s - t) F of a network's output F = F(x_t, t, s): the state at time s.

    The noise is at t = 0 and the action at t = 1 (`NOISE_AT_ZERO`). x_t, f_theta: [B, horizon, dim]; t, s: [B].
    Raises ValueError for shapes that do not fit.
    """
    _check_alike("f_theta", f_theta, x_t)
    return x_t + (_times("s", s, x_t) - _times("t", t, x_t)) * f_theta


def flow_matching_loss(f_theta: Tensor, velocity: Tensor) -> Tensor:
    """mean((F - v)^2) of a network's output F(x_t, t, t) and the velocity v = x_1 - x_0, from the noise at t = 0 to the
    action at t = 1 (`NOISE_AT_ZERO`). Both [B, horizon, dim]; a scalar. Raises ValueError for shapes that differ."""
    _check_alike("velocity", velocity, f_theta)
    return (f_theta - velocity).square().mean()


def consistency_loss(f_current: Tensor, f_target: Tensor) -> Tensor:
    """mean((f - f')^2) of f = f(x_t, t, s) and f' = f(x_l, l, s) from a point x_l = x_t + (l - t) v further on, t < l <
    s, where the noise is at t = 0 and the action at t = 1 (`NOISE_AT_ZERO`).

    The target f' is taken without gradient. Both [B, horizon, dim]; a scalar. Raises ValueError for shapes that differ.
    """
    _check_alike("f_target", f_target, f_current)
    return (f_current - f_target.detach()).square().mean()


def combined_loss(fm: Tensor, scm: Tensor, lam: float = 0.5) -> Tensor:
    """lam fm + (1 - lam) scm, of the losses of flow matching and of solution consistency, both with the noise at t = 0
    (`NOISE_AT_ZERO`). Raises ValueError for a `lam` that is not in [0, 1]."""
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must be in [0, 1], got {lam}")
    return lam * fm + (1 - lam) * scm


def one_step_sample(policy: Policy, observations: Tensor, noise: Tensor) -> Tensor:
    """Chunks of actions [B, horizon, dim] by one call, noise + F(noise, 0, 1): from the noise at t = 0 to the actions
    at t = 1 (`NOISE_AT_ZERO`). policy: as `SoFlowPolicy`; observations: [B, obs_size]; noise: [B, horizon, dim],
    standard normal. Raises ValueError for shapes that do not fit."""
    return multi_step_sample(policy, observations, noise, steps=1)


def multi_step_sample(policy: Policy, observations: Tensor, noise: Tensor, steps: int = 2) -> Tensor:
    """The same by `steps` calls, each over an equal segment of the times from the noise at t = 0 to the actions at
    t = 1 (`NOISE_AT_ZERO`), from where the one before has come to; no noise is added on the way.

    Raises ValueError for `steps` below 1 and shapes that do not fit.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1, got {steps!r}")
    if noise.dim() != 3 or not noise.is_floating_point():
        raise ValueError(f"noise must be floating [B, horizon, dim], got {noise.dtype} {list(noise.shape)}")
    x = noise
    for k in range(steps):
        t, s = (torch.full((len(x),), at / steps, dtype=x.dtype, device=x.device) for at in (k, k + 1))
        x = euler_parameterize(x, policy(x, t, s, observations), t, s)
    return x


def euler_sample(policy: Policy, observations: Tensor, noise: Tensor, steps: int = 10) -> Tensor:
    """The same of a policy that has learned velocities alone (flow matching): `steps` Euler steps along F(x, t, t) from
    the noise at t = 0 to the actions at t = 1 (`NOISE_AT_ZERO`). Raises ValueError as `multi_step_sample` does."""

    def velocity(x: Tensor, t: Tensor, s: Tensor, observations: Tensor) -> Tensor:
        return policy(x, t, t, observations)

    return multi_step_sample(velocity, observations, noise, steps)


def _times(name: str, t: Tensor, like: Tensor) -> Tensor:
    """Times [B] as [B, 1, 1]."""
    if not t.is_floating_point() or t.shape != like.shape[:1]:
        raise ValueError(f"{name} must be floating [{len(like)}], got {t.dtype} {list(t.shape)}")
    return t[:, None, None]


def _check_alike(name: str, value: Tensor, like: Tensor) -> None:
    if like.dim() != 3 or not like.is_floating_point():
        raise ValueError(f"tensors must be floating [B, horizon, dim], got {like.dtype} {list(like.shape)}")
    if value.shape != like.shape or not value.is_floating_point():
        raise ValueError(f"{name} must be floating {list(like.shape)}, got {value.dtype} {list(value.shape)}")
