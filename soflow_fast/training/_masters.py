"""What stands behind the parameters of an optimiser that does not know of it: float32 masters, and averages."""

import torch
from torch import Tensor


class Masters:
    """The float32 weights behind the parameters: masters of those in low precision, else the parameters themselves."""

    def __init__(self, params: list[Tensor], masters: list[Tensor | None]) -> None:
        self.params = params
        self.all = [p if m is None else m for p, m in zip(params, masters, strict=True)]
        self._pairs = [(p, m) for p, m in zip(params, self.all, strict=True) if p is not m]

    @torch.no_grad()
    def read(self) -> None:
        """Take over gradients, and parameters that were written since."""
        for p, m in self._pairs:
            m.grad = None if p.grad is None else p.grad.to(m.dtype)
        self.take_written()

    @torch.no_grad()
    def take_written(self) -> list[Tensor]:
        """All masters, after parameters that were written since became theirs."""
        for p, m in self._pairs:
            m.copy_(torch.where(m.to(p.dtype) == p, m, p.to(m.dtype)))
        return self.all

    @torch.no_grad()
    def write(self) -> None:
        """Round the masters to their parameters."""
        if self._pairs:
            torch._foreach_copy_([p for p, _ in self._pairs], [m for _, m in self._pairs])

    def zero_grad(self, set_to_none: bool) -> None:
        for _, m in self._pairs:
            m.grad = None
        for p in self.params:
            p.grad = None if set_to_none or p.grad is None else torch.zeros_like(p.grad)


class Averages:
    """The averages of an optimiser that does not know them: a += (1 - d) (p - a), nothing where `finite` is False."""

    def __init__(self, params: list[Tensor], emas: list[list[Tensor]]) -> None:
        self.params, self.emas = params, emas
        self.decays = torch.zeros(len(emas), dtype=torch.float64, device=params[0].device)

    @torch.no_grad()
    def update(self, finite: Tensor | None, first: int = 0) -> None:
        """first: the number of the first average that is updated."""
        weights = (1 - self.decays) if finite is None else (1 - self.decays) * finite
        for average, weight in zip(self.emas[first:], weights.float()[first:], strict=True):
            chosen = [(p, a) for p, a in zip(self.params, average, strict=True) if p.grad is not None]
            params, averages = [p for p, _ in chosen], [a for _, a in chosen]
            change = torch._foreach_sub(params, averages)
            torch._foreach_mul_(change, weight)
            torch._foreach_add_(averages, change)


class OnMasters:
    """An optimiser of `Masters`, the parameters of others."""

    _masters: Masters

    @property
    def masters(self) -> list[Tensor]:
        """The float32 weight behind every parameter, as it is or was written since."""
        return self._masters.take_written()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._masters.zero_grad(set_to_none)
