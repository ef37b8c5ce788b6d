"""Other people's optimisers that update weights, averages and low-precision copies in one pass, where installed.

apex's `FusedAdamSWA` (apex.contrib.openfold_triton) is `adamw_ema` with one average: float32 parameters, gradients and
copies in another dtype, moments and average in float32, one Triton kernel. It asks for copies in any case: without
them the parameters stand in their place and are written twice. The number of the update, the learning rate and the
decay are read by the host, and addresses go up in each call, so that no CUDA graph can hold it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines.norms import Found, found

Update = Callable[..., None]
"""Takes what `adamw_ema` takes, and writes where it writes."""


def optimizers(device: torch.device) -> Found[Update]:
    """Other people's optimisers with the arguments of `adamw_ema`, or why they are not here."""
    module = "apex.contrib.openfold_triton.fused_adam_swa"
    return found(device, {"apex FusedAdamSWA": ("apex", module, "apex", _fused_adam_swa)})


def _fused_adam_swa(module: Any) -> Update:
    made: dict[int, tuple[Any, int]] = {}
    make, math = module.FusedAdamSWA, module.AdamMathType.ApexAdamW

    def update(
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        steps: Sequence[Tensor],
        lr: Tensor,
        *,
        emas: Sequence[Sequence[Tensor]],
        ema_decays: Tensor,
        low_precision: Sequence[Tensor] | None = None,
        **settings: Any,
    ) -> None:
        key = params[0].data_ptr()  # of memory that the optimiser keeps alive
        if key not in made:
            copies = list(low_precision or params)
            optimizer = make(
                list(params),
                copies,
                list(emas[0]),
                float(ema_decays[0]),
                lr=float(lr),
                adam_math_mode=math,
                **settings,
            )
            for p, copy, grad, first, second in zip(params, copies, grads, exp_avgs, exp_avg_sqs, strict=True):
                optimizer.state[p] = {"exp_avg": first, "exp_avg_sq": second}
                copy.grad = grad
            optimizer.swa_param_groups[0]["n_averaged"] = 1  # a first one would be a copy of the parameters
            made[key] = optimizer, int(steps[0]) - 1
        optimizer, before = made[key]
        optimizer.param_groups[0]["step"] = before  # each call is the same update, as `steps` says
        optimizer.step()

    return update
