"""Checkpoints of the authors' public trainer (zlab-princeton/SoFlow). Keys are the DiT's after `network.`."""

import os
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..config.schema import DIT_SIZES, Coefficients, DiTConfig, FlowPath
from ..errors import CheckpointError
from ..flow import SolutionFlow
from .dit import DiT

_EMA_ENTRIES = ("ema", "model_ema", "ema_model", "ema_state_dict", "ema_network")
_MODEL_ENTRIES = ("model", "state_dict", "network", "model_state_dict")


def load_official(
    source: str | os.PathLike | Mapping[str, Any],
    config: DiTConfig | None = None,
    *,
    path: FlowPath = "linear",
    coefficients: Coefficients = "euler",
) -> SolutionFlow:
    """A SolutionFlow in eval mode from the authors' checkpoint.

    Args:
        source: a file written by torch.save, or a state dict with keys `network...`; or either one wrapped in a dict
            with entries such as "model" and "ema", of which the EMA weights are taken. Nothing in a file is executed.
        config: the network's shape; None: inferred from the weights, which works for the public sizes (the number of
            heads of another one cannot be seen in its weights).
        path, coefficients: those of SolutionFlow.

    Raises:
        CheckpointError: if the file is missing, unreadable or its weights do not fit.
    """
    where = "the state dict" if isinstance(source, Mapping) else os.fspath(source)
    weights = _find_weights(source if isinstance(source, Mapping) else _read(where), where)
    config = config or _infer_config(weights, where)
    flow = SolutionFlow(DiT(config), path, coefficients)
    expected = flow.state_dict()
    weights.setdefault("network.pos_embed", expected["network.pos_embed"])
    for name in sorted({*expected, *weights}):
        if name not in weights:
            raise CheckpointError(f"{where}: {name} is missing")
        if name not in expected:
            raise CheckpointError(f"{where}: {name} has no place in the model")
        if weights[name].shape != expected[name].shape:
            got, wanted = list(weights[name].shape), list(expected[name].shape)
            raise CheckpointError(f"{where}: {name} is {got}, the model's is {wanted}")
    flow.load_state_dict(weights)
    return flow.eval()


def _read(where: str) -> Mapping[str, Any]:
    """The content of a file of torch.save. Raises CheckpointError for anything but a dict of plain values."""
    try:
        with open(where, "rb") as file:
            # Torch never compresses; a file that unpacks to more than its size could fill the memory.
            if zipfile.is_zipfile(file) and any(
                info.file_size > info.compress_size for info in zipfile.ZipFile(file).infolist()
            ):
                raise ValueError("its parts are compressed")
        content = torch.load(where, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{where}: {error.strerror or error}") from None
    except Exception as error:  # the unpickler raises many kinds; all mean that the file is not plain weights
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{where}: not a checkpoint of plain weights ({reason})") from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{where}: holds a {type(content).__name__}, not weights")
    return content


def _find_weights(content: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """{key: tensor} from a checkpoint's content: the EMA's where it has them, keys without prefixes of wrappers."""
    for name in (*_EMA_ENTRIES, *_MODEL_ENTRIES):
        if isinstance(content.get(name), Mapping):
            return _find_weights(content[name], where)
    weights = {}
    for key, value in content.items():
        if isinstance(value, Tensor) and isinstance(key, str):
            name = key.replace("module.", "").replace("_orig_mod.", "")
            if value.untyped_storage().nbytes() < value.numel() * value.element_size():
                raise CheckpointError(f"{where}: {key} is larger than what is stored of it")
            weights[name if name.startswith("network.") else f"network.{name}"] = value
    if "network.x_embedder.proj.weight" not in weights:
        raise CheckpointError(f"{where}: no DiT weights (network.x_embedder.proj.weight and so on)")
    return weights


def _infer_config(weights: Mapping[str, Tensor], where: str) -> DiTConfig:
    """The configuration of a public size from the shapes of its weights. Raises CheckpointError for another one."""
    try:
        hidden_size, in_channels, patch_size, _ = weights["network.x_embedder.proj.weight"].shape
        depth = 1 + max(int(key.split(".")[2]) for key in weights if key.startswith("network.blocks."))
        num_classes = len(weights["network.y_embedder.embedding_table.weight"]) - 1
        mlp_ratio = len(weights["network.blocks.0.mlp.fc1.bias"]) / hidden_size
        tokens = weights["network.pos_embed"].shape[1]
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise CheckpointError(f"{where}: not the weights of a DiT ({error}); give a DiTConfig") from None
    heads = {(d, h): n for d, h, n, _ in DIT_SIZES.values()}
    if (depth, hidden_size) not in heads:
        raise CheckpointError(
            f"{where}: depth {depth} and hidden size {hidden_size} are no public size; give a DiTConfig with num_heads"
        )
    return DiTConfig(
        input_size=round(tokens**0.5) * patch_size,
        patch_size=patch_size,
        in_channels=in_channels,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=heads[depth, hidden_size],
        mlp_ratio=mlp_ratio,
        num_classes=num_classes,
    )
