"""The weights of EDM's SongUNet with a second time, which the authors train on CIFAR-10, by the names of our U-Net.

Theirs are the same parts with other names inside, queries, keys and values in one convolution, and the filters of the
resampling as buffers. A second embedding of a time is whatever begins with `map_` beside EDM's own layers: two linear
layers of the shapes of `map_layer0` and `map_layer1`. Which time it sees cannot be read from it: t - s is assumed, as
of their DiT.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ...config.schema import UNetConfig
from ...errors import CheckpointError
from ..unet import AUGMENTATION

FIRST = "map_layer0.weight"
"""A tensor that every SongUNet has."""
MAP = "map_"
"""What the embeddings begin with."""
PARTS = {"enc", "dec"}
INNER = {
    "norm0": "resnet.norm1",
    "conv0": "resnet.conv1",
    "affine": "resnet.time_emb_proj",
    "norm1": "resnet.norm2",
    "conv1": "resnet.conv2",
    "skip": "resnet.conv_shortcut",
    "norm2": "attention.group_norm",
    "proj": "attention.to_out.0",
}
EMBEDDINGS = {
    "map_layer0": "t_embedder.linear_1",
    "map_layer1": "t_embedder.linear_2",
    "map_augment": "t_embedder.cond_proj",
}


def is_song_unet(weights: Mapping[str, Tensor]) -> bool:
    """Whether weights are a SongUNet's, by their names."""
    return FIRST in weights


def infer(weights: Mapping[str, Tensor], where: str) -> UNetConfig:
    """The configuration by the names and shapes of the weights, which do not show the dropout. Raises CheckpointError
    for another network than an unconditional DDPM++."""
    blocks: dict[int, set[int]] = {}
    attention: set[int] = set()
    widths: dict[int, int] = {}
    for name, value in weights.items():
        known = re.fullmatch(r"enc\.([0-9]{1,4})x\1_block([0-9]{1,3})\.(conv0|qkv)\.weight", name)
        if known and value.dim() == 4:
            size = int(known[1])
            blocks.setdefault(size, set()).add(int(known[2]))
            widths[size] = widths.get(size, len(value)) if known[3] == "qkv" else len(value)
            attention |= {size} if known[3] == "qkv" else set()
    try:
        sizes = sorted(blocks, reverse=True)
        first = weights[f"enc.{sizes[0]}x{sizes[0]}_conv.weight"]
        channels, in_channels = first.shape[:2]
        numbers = {len(found) for found in blocks.values()}
        halved = all(size == sizes[0] >> level for level, size in enumerate(sizes))
        if len(numbers) != 1 or not halved or any(width % channels for width in widths.values()):
            raise ValueError("levels of other sizes")
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"{where}: not the weights of a DDPM++ U-Net ({error}); give a UNetConfig") from None
    if "map_label.weight" in weights:
        raise CheckpointError(f"{where}: map_label.weight: its network has labels, the U-Net here has none")
    return UNetConfig(
        input_size=sizes[0],
        in_channels=in_channels,
        channels=channels,
        multipliers=tuple(widths[size] // channels for size in sizes),
        blocks=numbers.pop(),
        attention_sizes=tuple(sorted(attention, reverse=True)) or (0,),
        augmentation_labels="map_augment.weight" in weights,
    )


def named(weights: Mapping[str, Tensor], config: UNetConfig, where: str) -> dict[str, Tensor]:
    """The weights by their names in our U-Net. Raises CheckpointError for what has no place there, in one line; names
    and shapes of the rest are for `checked` to compare."""
    second = _second_embedding(weights, config, where)
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        part, _, kind = name.rpartition(".")
        if part in EMBEDDINGS or part in second:
            found[f"{EMBEDDINGS.get(part) or second[part]}.{kind}"] = value
            continue
        if kind == "resample_filter":
            if value.shape != (1, 1, 2, 2) or not torch.all(value == 0.25):
                raise CheckpointError(f"{where}: {name} is another filter than the mean of 2 x 2 numbers")
            continue
        known = re.fullmatch(r"(enc|dec)\.([0-9]+x[0-9]+_[a-z0-9_]+)(?:\.([a-z]+[0-9]?))?", part)
        if known is None or (known[3] not in (None, "qkv") and known[3] not in INNER):
            raise CheckpointError(f"{where}: {name} has no place in the model")
        outer = f"{known[1]}.{known[2]}"
        if known[3] is None:
            found[f"{outer}.{kind}"] = value
        elif known[3] == "qkv":
            if len(value) % 3:
                raise CheckpointError(f"{where}: {name} is {list(value.shape)}, no queries, keys and values")
            for k, each in enumerate(("to_q", "to_k", "to_v")):  # rows of the three in turn
                found[f"{outer}.attention.{each}.{kind}"] = value[k::3].flatten(1) if value.dim() > 1 else value[k::3]
        else:
            flat = known[3] == "proj" and value.dim() > 1
            found[f"{outer}.{INNER[known[3]]}.{kind}"] = value.flatten(1) if flat else value
    return found


def _second_embedding(weights: Mapping[str, Tensor], config: UNetConfig, where: str) -> dict[str, str]:
    """Our names of the layers that embed the second time. Raises CheckpointError."""
    C, E = config.channels, 4 * config.channels
    if tuple(weights[FIRST].shape) == (E, 2 * C):
        raise CheckpointError(
            f"{where}: {FIRST} takes both times at once ({2 * C} numbers); here each has its own layers"
        )
    shapes: dict[tuple[int, ...], str] = {(E, C): "s_embedder.linear_1", (E, E): "s_embedder.linear_2"}
    found: dict[str, str] = {}
    for name, value in weights.items():
        part, _, kind = name.rpartition(".")
        if not name.startswith(MAP) or part in EMBEDDINGS:
            continue
        if kind == "weight":
            ours = shapes.get(tuple(value.shape))
            if ours is None or ours in found.values():
                raise CheckpointError(f"{where}: {name} {list(value.shape)} has no place in the model")
            found[part] = ours
    if len(found) < 2:
        raise CheckpointError(
            f"{where}: its network sees one time: no second pair of layers beside map_layer0, map_layer1"
        )
    return found


def fitted(config: UNetConfig, weights: Mapping[str, Tensor], where: str) -> UNetConfig:
    """`config`, or what the weights show with its dropout; they must agree. Raises CheckpointError naming a field."""
    shown = replace(infer(weights, where), dropout=config.dropout)
    wrong = next((name for name, value in vars(shown).items() if getattr(config, name) != value), None)
    if wrong is not None:
        given, theirs = getattr(config, wrong), getattr(shown, wrong)
        raise CheckpointError(f"{where}: {wrong} is {theirs} in its network, the configuration says {given}")
    labels = weights.get("map_augment.weight")
    if labels is not None and labels.shape[1:] != (AUGMENTATION,):
        raise CheckpointError(
            f"{where}: map_augment.weight is {list(labels.shape)}, the model's sees {AUGMENTATION} labels"
        )
    return config
