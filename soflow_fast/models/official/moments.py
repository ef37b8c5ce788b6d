"""The state of the authors' optimiser, AdamW of torch: moments and steps by the names of the weights.

torch numbers parameters in the order in which the network has them. Theirs has its positions as a parameter that is
not trained, before all others, so the numbers are one higher than ours. They are not counted on: the order of the names
in the file's own weights is that of its parameters.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from .wrapped import Weights

PARTS = ("step", "exp_avg", "exp_avg_sq")


def named(content: Mapping[str, Any], weights: Weights, where: str) -> dict[str, dict[str, Tensor]]:
    """{name in the DiT: {"step": [], "exp_avg": like the weight, "exp_avg_sq": like it}} of a checkpoint, float32.

    weights: those that were trained, of the same file. Raises CheckpointError if there is no AdamW state of them.
    """
    optimizer = content.get("optimizer")
    if not isinstance(optimizer, Mapping) or not isinstance(optimizer.get("state"), Mapping):
        raise CheckpointError(f"{where}: holds no state of an optimiser")
    names = list(weights.tensors)
    numbers = [number for group in _groups(optimizer.get("param_groups")) for number in group["params"]]
    if len(numbers) != len(names):
        without = [name for name in names if name != "pos_embed"]
        if len(numbers) != len(without):
            raise CheckpointError(f"{where}: optimiser of {len(numbers)} weights, the network has {len(names)}")
        names = without
    by_number = dict(zip(numbers, names, strict=True))
    found: dict[str, dict[str, Tensor]] = {}
    for number, entry in optimizer["state"].items():
        name = by_number.get(number, "")
        if not name or not isinstance(entry, Mapping):
            raise CheckpointError(f"{where}: optimiser of another model: {str(number)[:20]} is no weight of it")
        found[name] = {part: _moment(entry.get(part), part, weights.tensors[name], name, where) for part in PARTS}
    missing = [name for name in names if name not in found and name != "pos_embed"]
    if missing and found:
        raise CheckpointError(f"{where}: the optimiser's state of {missing[0]} is missing")
    return found


def _groups(found: Any) -> list[Mapping[str, Any]]:
    groups = found if isinstance(found, list) else []
    return [group for group in groups if isinstance(group, Mapping) and isinstance(group.get("params"), list)]


def _moment(value: Any, part: str, weight: Tensor, name: str, where: str) -> Tensor:
    if type(value) in (int, float):  # the steps of a torch before 1.12
        value = torch.tensor(float(value))
    shape = torch.Size() if part == "step" else weight.shape
    if not isinstance(value, Tensor) or value.shape != shape:
        raise CheckpointError(f"{where}: the optimiser's {part} of {name} is no AdamW state of this network")
    return value.detach().to("cpu", torch.float32)
