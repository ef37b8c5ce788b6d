"""The network's weights in whatever they were wrapped, averaged and put into."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from soflow_fast import DiT, DiTConfig, SolutionFlow
from soflow_fast.errors import CheckpointError
from soflow_fast.models.official.wrapped import find_average, find_network

CONFIG = DiTConfig(input_size=4, patch_size=2, in_channels=1, hidden_size=8, depth=2, num_heads=2, num_classes=3)
Weights = dict[str, Tensor]


def weights(seed: int) -> Weights:
    """By the names in the DiT."""
    source = torch.Generator().manual_seed(seed)
    return {name: torch.randn(v.shape, generator=source) for name, v in DiT(CONFIG).state_dict().items()}


def flow_of(values: Weights) -> SolutionFlow:
    flow = SolutionFlow(DiT(CONFIG))
    flow.network.load_state_dict(values)
    return flow


def under(prefix: str, values: Weights) -> Weights:
    return {prefix + name: value for name, value in values.items()}


def inside(values: Weights, component: str) -> Weights:
    """With a component after each number of a block, as checkpointing and FSDP put one in."""
    return {name.replace("blocks.0.", f"blocks.0.{component}."): value for name, value in values.items()}


def averaged_by_torch(ema: Weights, raw: Weights) -> Any:
    average = AveragedModel(flow_of(ema))
    average.update_parameters(flow_of(ema))
    return {"model": under("network.", raw), "swa_weights": average.state_dict()}


def ema_pytorch(ema: Weights, raw: Weights) -> Any:
    flat = under("online_model.", raw) | under("ema_model.", ema)
    return flat | {"initted": torch.tensor(True), "step": torch.tensor(7)}


BOTH: dict[str, Callable[[Weights, Weights], Any]] = {
    "the authors' file": lambda ema, raw: {
        "model": under("network.", raw),
        "ema_model": under("network.", ema),
        "optimizer": {"state": {}, "param_groups": []},
        "finished_steps": 3,
    },
    "model and ema": lambda ema, raw: {"ema": ema, "model": raw, "step": 3},
    "another order": lambda ema, raw: {"model_ema": ema, "state_dict": raw},
    "DistributedDataParallel": lambda ema, raw: {"ema": under("module.", ema), "model": under("module.", raw)},
    "compiled": lambda ema, raw: {"params_ema": under("_orig_mod.network.", ema), "params": under("module.", raw)},
    "FSDP and checkpointing": lambda ema, raw: {
        "ema": inside(under("_fsdp_wrapped_module.", ema), "_checkpoint_wrapped_module"),
        "model": inside(
            under("_orig_mod._fsdp_wrapped_module.", raw), "_fsdp_wrapped_module._checkpoint_wrapped_module"
        ),
    },
    "AveragedModel": averaged_by_torch,
    "ema_pytorch": ema_pytorch,
    "ema_pytorch in a file": lambda ema, raw: {"ema": ema_pytorch(ema, raw), "args": {"lr": 1e-4}},
    "Lightning": lambda ema, raw: {"state_dict": under("model.network.", raw) | under("ema.module.network.", ema)},
    "shadow": lambda ema, raw: {"net": raw, "ema": {"decay": 0.99, "shadow": ema, "num_updates": 3}},
    "shadow_params": lambda ema, raw: {
        "model": raw,
        "ema": {"decay": 0.99, "num_updates": 3, "shadow_params": list(ema.values()), "collected_params": None},
    },
    "shadow_params of what is trained": lambda ema, raw: {
        "model": raw,
        "ema": {"shadow_params": [value for name, value in ema.items() if name != "pos_embed"]},
    },
    "one average by its decay": lambda ema, raw: {"network": raw, "ema_0.9999": ema},
}


@pytest.mark.parametrize("form", BOTH)
def test_the_average_and_the_weights_are_told_apart(form: str) -> None:
    ema, raw = weights(0), weights(1)
    content = BOTH[form](ema, raw)
    for found, expected in ((find_average(content, "x"), ema), (find_network(content, "x"), raw)):
        assert all(torch.equal(value, expected[name]) for name, value in found.tensors.items())
        assert expected.keys() - found.tensors.keys() <= {"pos_embed"}


ALONE: dict[str, Callable[[Weights], Any]] = {
    "plain": lambda raw: raw,
    "network": lambda raw: under("network.", raw),
    "wrapped twice": lambda raw: under("_orig_mod.module.model.network.", raw),
    "AveragedModel alone": lambda raw: AveragedModel(flow_of(raw)).state_dict(),
    "deep": lambda raw: {"state": {"checkpoint": {"model": raw}}},
    "a counter": lambda raw: raw | {"num_batches_tracked": torch.tensor(3), "global_step": torch.tensor(4)},
}


@pytest.mark.parametrize("form", ALONE)
def test_the_only_weights_are_both(form: str) -> None:
    raw = weights(0)
    content = ALONE[form](raw)
    for found in (find_average(content, "x"), find_network(content, "x")):
        assert found.tensors.keys() == raw.keys()
        assert all(torch.equal(value, raw[name]) for name, value in found.tensors.items())


def test_prefixes_are_cut_as_whole_components_alone() -> None:
    raw = weights(0)
    for prefix in ("submodule.", "mymodel.", "network2.", "modules.", "encoder.", "model_.", "a._orig_mod."):
        with pytest.raises(CheckpointError, match="x: no DiT weights"):
            find_average(under(prefix, raw), "x")
    vae = {"vae.blocks.0.weight": torch.zeros(3), "vae.x_embedder.proj.weight": torch.zeros(3)}
    found = find_average({"model": raw, **vae}, "x")
    assert found.tensors.keys() == raw.keys()


class Module(nn.Module):
    pass


def test_what_cannot_be_told_is_said() -> None:
    ema, raw = weights(0), weights(1)
    for content, message in (
        ({"ema_0.99": ema, "ema_0.9999": raw}, "several networks (ema_0.99, ema_0.9999); give a state dict of one"),
        ({"model": ema, "discriminator": raw}, "several networks (model, discriminator)"),
        ({"ema": {"shadow_params": list(ema.values())}}, "ema.shadow_params is a list without names"),
        ({"model": raw, "ema": {"shadow_params": list(ema.values())[:-1]}}, "shadow_params does not fit"),
        (under("module.", raw) | under("", {"pos_embed": raw["pos_embed"]}), "pos_embed is there twice"),
        ({"model": raw | {"extra": torch.zeros(1)}}, "extra has no place in the model"),
        ({"model": under("module.", raw | {"head.weight": torch.zeros(1)})}, "module.head.weight has no place"),
        ({"x_embedder.proj.weight": torch.zeros(1).expand(9, 9, 9, 9)}, "proj.weight is larger than what is stored"),
        ({"ema": {}, "step": 3}, "no DiT weights"),
    ):
        with pytest.raises(CheckpointError) as error:
            find_average(content, "x")
        assert str(error.value).startswith("x: ") and message in str(error.value)
