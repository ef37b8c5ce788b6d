"""RAdam (Liu et al. 2020, arXiv 1908.03265) with the interface of `AdamWEMA`, and an average in float64 if asked for.

While rho_t, the length of the average of squares so far, is at most 5, their root says little and is left out: the step
is that of the mean gradient alone. Weight decay is decoupled, as AdamW's. Nothing is copied to the host.
"""

from typing import Any

import torch
from torch import Tensor

from ._masters import Averages, Masters, OnMasters

AVERAGE = "average"
"""The name of the float64 average in a parameter's state."""


class RAdam(OnMasters, torch.optim.Optimizer):
    """masters, averages: the weights that are updated, and what follows them, by `_masters`. wide: accumulate
    the first of the averages in float64, and round it to its place."""

    def __init__(self, masters: Masters, averages: Averages, wide: bool, **settings: Any) -> None:
        self._masters, self._averages, self._wide = masters, averages, wide
        super().__init__(masters.all, settings)
        self.ema_decays: Tensor = averages.decays

    @torch.no_grad()
    def step(self, *, grad_scale: Tensor | None = None, finite: Tensor | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._masters.read()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, group, grad_scale, finite)
        self._average(finite)
        self._masters.write()

    def _update(
        self, params: list[Tensor], group: dict[str, Any], grad_scale: Tensor | None, finite: Tensor | None
    ) -> None:
        device = params[0].device
        happens = torch.ones((), dtype=torch.bool, device=device) if finite is None else finite
        states = [self._state_of(p) for p in params]
        steps, means, squares = ([state[name] for state in states] for name in ("step", "exp_avg", "exp_avg_sq"))
        # Of a step that is refused the gradients may be NaN, which no product with 0 makes 0.
        grads = [torch.where(happens, p.grad, 0) for p in params]  # pyright: ignore[reportArgumentType, reportCallIssue]
        if grad_scale is not None:
            torch._foreach_mul_(grads, torch.where(happens, grad_scale, 1))
        torch._foreach_add_(steps, happens.float())
        (b1, b2), t = group["betas"], steps[0].double()
        new1, new2 = (torch.where(happens, 1 - beta, 0).float() for beta in (b1, b2))
        torch._foreach_mul_(means, 1 - new1)
        torch._foreach_add_(means, torch._foreach_mul(grads, new1))
        torch._foreach_mul_(squares, 1 - new2)
        torch._foreach_mul_(grads, grads)
        torch._foreach_add_(squares, torch._foreach_mul(grads, new2))

        correction1, correction2 = 1 - b1**t, 1 - b2**t
        longest = 2 / (1 - b2) - 1
        length = longest - 2 * t * b2**t / correction2
        rectified = length > 5
        safe = torch.where(rectified, length, 6.0)
        ratio = (safe - 4) * (safe - 2) * longest / ((longest - 4) * (longest - 2) * safe)
        factor = torch.where(rectified, (ratio * correction2).sqrt(), 1.0) / correction1
        lr = torch.as_tensor(group["lr"], device=device).double()
        factor = torch.where(happens, lr * factor, 0.0)

        denominators = torch._foreach_sqrt(squares)
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_mul_(denominators, rectified.float())
        torch._foreach_add_(denominators, (~rectified).float())
        changes = torch._foreach_div(means, denominators)
        torch._foreach_mul_(changes, -factor.float())
        if group["weight_decay"]:
            torch._foreach_mul_(params, torch.where(happens, 1 - lr * group["weight_decay"], 1.0).float())
        torch._foreach_add_(params, changes)

    def _state_of(self, p: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            if self._wide:
                number = next(k for k, each in enumerate(self._masters.all) if each is p)
                state[AVERAGE] = self._averages.emas[0][number].detach().double()
        return state

    def _average(self, finite: Tensor | None) -> None:
        if not self._wide:
            self._averages.update(finite)
            return
        weight = 1 - self.ema_decays[0]
        weight = weight if finite is None else torch.where(finite, weight, 0.0)
        pairs = zip(self._masters.all, self._averages.emas[0], strict=True)
        chosen = [(self.state[p][AVERAGE], p, rounded) for p, rounded in pairs if p in self.state]
        wide, params, rounded = ([each[k] for each in chosen] for k in range(3))
        changes = torch._foreach_sub(wide, params)
        torch._foreach_mul_(changes, -weight)
        torch._foreach_add_(wide, changes)
        torch._foreach_copy_(rounded, wide)
        self._averages.update(finite, first=1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would round the average to the dtype of its parameter."""
        super().load_state_dict(state_dict)
        if self._wide:
            for group, given in zip(self.param_groups, state_dict["param_groups"], strict=True):
                for p, number in zip(group["params"], given["params"], strict=True):
                    if AVERAGE in state_dict["state"].get(number, {}):
                        self.state[p][AVERAGE] = state_dict["state"][number][AVERAGE].to(
                            p.device, torch.float64, copy=True
                        )
