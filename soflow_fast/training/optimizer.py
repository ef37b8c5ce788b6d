"""AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) and the averages of the weights, by three implementations; RAdam.

* "soflow": `soflow_kernels.AdamWEMA`, one pass over everything: update, averages, parameters in low precision;
* "torch": torch's fused AdamW, then the averages and the rounding by `foreach` operations;
* "apex": apex's FusedAdam, the same way.

Parameters in low precision have float32 masters, which the optimiser updates and rounds to them. A parameter that
somebody else has written since, so that it is not its master rounded, becomes the master of the next step. The three
agree to float32 rounding and read each other's state. A step whose gradients are not finite changes nothing.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from soflow_kernels import AdamWEMA

from ..config.schema import OptimConfig
from ..errors import ConfigError
from ._masters import Averages, Masters, OnMasters
from ._radam import AVERAGE, RAdam


class TorchAdamW(OnMasters, torch.optim.AdamW):
    """torch's fused AdamW with the interface of `AdamWEMA`."""

    def __init__(
        self, params: list[Tensor], masters: list[Tensor | None], emas: list[list[Tensor]], **settings: Any
    ) -> None:
        self._masters = Masters(params, masters)
        # `capturable` says that a CUDA graph may record the step.
        super().__init__(self._masters.all, fused=True, capturable=params[0].is_cuda, **settings)
        self._averages = Averages(self._masters.all, emas)
        self.ema_decays = self._averages.decays

    @torch.no_grad()
    def step(self, *, grad_scale: Tensor | None = None, finite: Tensor | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._masters.read()
        # What a gradient scaler would set: a divisor of the gradients, and 1 for a step that is to be skipped.
        self.grad_scale = None if grad_scale is None else grad_scale.reciprocal()
        self.found_inf = None if finite is None else (~finite).float()
        super().step()
        self._averages.update(finite)
        self._masters.write()


class ApexAdamW(OnMasters):
    """apex's FusedAdam with the interface and the state_dict of `AdamWEMA`. Needs a GPU."""

    def __init__(
        self, params: list[Tensor], masters: list[Tensor | None], emas: list[list[Tensor]], **settings: Any
    ) -> None:
        from apex.optimizers import FusedAdam  # pyright: ignore[reportMissingImports]

        self._masters = Masters(params, masters)
        self.inner: Any = FusedAdam(self._masters.all, adam_w_mode=True, capturable=True, **settings)
        self._averages = Averages(self._masters.all, emas)
        self.ema_decays = self._averages.decays
        self._scale: Tensor | None = None
        self._found_inf: Tensor | None = None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    @property
    def state(self) -> Any:
        return self.inner.state

    @torch.no_grad()
    def step(self, *, grad_scale: Tensor | None = None, finite: Tensor | None = None) -> None:
        self._masters.read()
        one = torch.ones(1, device=self._masters.all[0].device)
        self._scale = one if grad_scale is None else grad_scale.reciprocal().view(1)
        self._found_inf = 0 * one if finite is None else (~finite).float().view(1)
        for group in self.inner.param_groups:
            if not isinstance(group["lr"], Tensor):  # its kernel reads the rate from the device
                group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=one.device)
        self.inner.step(grad_scaler=self)
        self._averages.update(finite)
        self._masters.write()

    # The two questions that FusedAdam has for a gradient scaler.
    def _check_inf_per_device(self, optimizer: Any) -> dict[torch.device, Tensor | None]:
        return {self._masters.all[0].device: self._found_inf}

    def _get_scale_async(self) -> Tensor | None:
        return self._scale

    def state_dict(self) -> dict[str, Any]:
        """As torch's: a step of its own in every parameter's entry."""
        found = self.inner.state_dict()
        for group in found["param_groups"]:
            step = group.pop("step", None)
            for index in group["params"] if step is not None else ():
                if index in found["state"]:
                    found["state"][index]["step"] = torch.as_tensor(step).float().reshape(())
        return found

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """As torch's; all parameters of a group must have taken the same number of steps."""
        entries = {index: dict(entry) for index, entry in values["state"].items()}
        groups = []
        for group in values["param_groups"]:
            steps = {int(entries[index].pop("step")) for index in group["params"] if index in entries}
            if len(steps) > 1:
                raise ValueError(f"parameters have taken {sorted(steps)} steps; FusedAdam counts one for all")
            device = self._masters.all[0].device
            counted = {"step": torch.tensor([steps.pop()], dtype=torch.int, device=device)} if steps else {}
            groups.append({**group, **counted})
        self.inner.load_state_dict({"state": entries, "param_groups": groups})


__all__ = ["AVERAGE", "ApexAdamW", "Optimizer", "RAdam", "TorchAdamW", "build_optimizer", "updated_parameters"]

Optimizer = AdamWEMA | TorchAdamW | ApexAdamW | RAdam


def updated_parameters(optimizer: Optimizer) -> list[Tensor]:
    """The parameters of the network that an optimiser updates."""
    if isinstance(optimizer, AdamWEMA):
        return [p for group in optimizer.param_groups for p in group["params"]]
    return optimizer._masters.params


def build_optimizer(
    kind: str, settings: OptimConfig, network: nn.Module, masters: list[Tensor | None], averages: list[nn.Module]
) -> Optimizer:
    """The optimiser of a network and its averages, whose decays the step sets. Raises ConfigError if it is not here.

    masters: in the order of the network's parameters, the float32 weights of those in low precision, else None.
    """
    params: list[Any] = list(network.parameters())
    emas: Any = [list(average.parameters()) for average in averages]
    options: Any = {name: getattr(settings, name) for name in ("lr", "betas", "eps", "weight_decay")}
    if settings.kind == "radam":
        behind = Masters(params, masters)
        return RAdam(behind, Averages(behind.all, emas), settings.ema_precision == "fp64", **options)
    if kind == "torch":
        return TorchAdamW(params, masters, emas, **options)
    if kind == "apex":
        if importlib.util.find_spec("apex") is None:
            raise ConfigError("--optimizer apex: apex is not installed (github.com/NVIDIA/apex, with its CUDA part)")
        if params[0].device.type != "cuda":
            raise ConfigError("--optimizer apex: FusedAdam needs a GPU")
        try:
            return ApexAdamW(params, masters, emas, **options)
        except (ImportError, RuntimeError) as error:
            raise ConfigError(f"--optimizer apex: {error}") from None
    return AdamWEMA(params, emas=emas, ema_decays=[0.0] * len(emas), masters=masters, **options)
