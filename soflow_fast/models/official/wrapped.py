"""Which tensors of a checkpoint are the network's: in whatever it was wrapped, averaged and put into.

A key is taken as components between its dots. What begins with a part of a DiT (`x_embedder`, `blocks`, ...) or of a
U-Net (`enc`, `map_layer0`, ...) is its name there; what stands before is where it was found: the entries of the file,
wrappers, words for a network or an average.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from torch import Tensor

from ...errors import CheckpointError
from . import song_unet
from .torch_file import Unmade

PARTS = {"x_embedder", "t_embedder", "s_embedder", "w_embedder", "y_embedder", "blocks", "final_layer", "pos_embed"}
WRAPPERS = {"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
"""Components that DistributedDataParallel, torch.compile, activation checkpointing and FSDP put in, anywhere."""
ONLINE = "online_model"
"""What ema_pytorch calls the network beside its average."""
NETWORKS = {"model", "network", "net", ONLINE}
"""Components that may stand before a network's names."""
AVERAGES = {"ema", "shadow", "averaged", "average", "avg", "swa"}
"""Words, between underscores, of what holds an average: ema_model, model_ema, shadow_params."""
BOOKKEEPING = {"n_averaged", "initted", "step", "num_updates", "decay", "num_batches_tracked", "global_step"}
"""Tensors that count, beside the weights."""
MOST_MAPPINGS = 10_000
"""In which weights are looked for: a small file can hold one of them any number of times."""
FIRST = "x_embedder.proj.weight"
"""A tensor that every DiT has."""


@dataclass
class Weights:
    """The weights of one network."""

    place: str
    """Where they were found: "ema_model.network"; "" at the top."""
    average: bool
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """By their names in the DiT or their U-Net, in the order in which they were found."""
    others: list[str] = field(default_factory=list)
    """Keys beside them that are no part of a network."""


def find_average(content: Mapping[str, Any], where: str) -> Weights:
    """The averaged weights of a checkpoint, or the only ones. Raises CheckpointError."""
    found = _candidates(content, where)
    return _only([each for each in found if each.average] or found, where, content)


def find_network(content: Mapping[str, Any], where: str) -> Weights:
    """The weights that are trained, or the only ones. Raises CheckpointError."""
    found = _candidates(content, where)
    return _only([each for each in found if not each.average] or found, where, content)


def _only(found: list[Weights], where: str, content: Mapping[str, Any]) -> Weights:
    if not found:
        unmade = sorted({value.name for value in content.values() if isinstance(value, Unmade)})
        known = f"; what it holds of {', '.join(unmade[:3])} is not read" if unmade else ""
        raise CheckpointError(f"{where}: no DiT weights (network.{FIRST} and so on){known}")
    if len(found) > 1:
        places = ", ".join(each.place or "the top" for each in found)
        raise CheckpointError(f"{where}: holds several networks ({places}); give a state dict of one")
    for key in found[0].others:
        raise CheckpointError(f"{where}: {key} has no place in the model")
    return found[0]


def _candidates(content: Mapping[str, Any], where: str) -> list[Weights]:
    """All networks in a checkpoint."""
    found: dict[tuple[str, ...], Weights] = {}
    lists: list[tuple[str, list[Tensor]]] = []
    for count, (path, mapping) in enumerate(_mappings(content, ())):
        if count == MOST_MAPPINGS:
            raise CheckpointError(f"{where}: holds more than {MOST_MAPPINGS} mappings")
        counted = any(isinstance(key, str) and key.split(".")[-1] == "n_averaged" for key in mapping)
        strays: dict[tuple[str, ...], list[str]] = {}
        for key, value in mapping.items():
            if _is_list(key, value):
                lists.append((".".join([*path, key]), list(value)))
            if not isinstance(key, str) or not isinstance(value, Tensor):
                continue
            parts = [part for part in key.split(".") if part not in WRAPPERS]
            at = next((i for i, part in enumerate(parts) if _is_part(part)), len(parts) - 1)
            before, name = tuple(parts[:at]), ".".join(parts[at:])
            if parts and parts[-1] in BOOKKEEPING and not _is_part(parts[at]):
                continue
            if not parts or not _is_part(parts[at]) or not all(map(_is_known, before)):
                strays.setdefault(tuple(takewhile(_is_known, parts)), []).append(key)
                continue
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise CheckpointError(f"{where}: {key} is larger than what is stored of it")
            place = (*path, *before)
            average = ONLINE not in place and (counted or any(map(_is_average, place)))
            weights = found.setdefault(place, Weights(".".join(place), average))
            if name in weights.tensors:
                raise CheckpointError(f"{where}: {key} is there twice, in different wrappers")
            weights.tensors[name] = value
        for before, keys in strays.items():
            if (*path, *before) in found:
                found[(*path, *before)].others += keys
    networks = [each for each in found.values() if FIRST in each.tensors or song_unet.is_song_unet(each.tensors)]
    return networks + [_named(place, values, networks, where) for place, values in lists]


def _mappings(content: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """A mapping and those in it, with the keys that lead there."""
    yield path, content
    for key, value in content.items():
        if isinstance(value, Mapping) and isinstance(key, str):
            yield from _mappings(value, (*path, key))


def _is_part(component: str) -> bool:
    """Whether a component is the first of a name in a network."""
    return component in PARTS or component in song_unet.PARTS or component.startswith(song_unet.MAP)


def _is_known(component: str) -> bool:
    return component in NETWORKS or _is_average(component)


def _is_average(component: str) -> bool:
    return not AVERAGES.isdisjoint(re.split(r"[_.]", component.lower()))


def _is_list(key: Any, value: Any) -> bool:
    """Whether an entry is an average as a list without names, as `shadow_params` are."""
    some = isinstance(value, list | tuple) and len(value) > 1
    return some and isinstance(key, str) and _is_average(key) and all(isinstance(each, Tensor) for each in value)


def _named(place: str, values: list[Tensor], networks: list[Weights], where: str) -> Weights:
    """An average without names by those of the network beside it. Raises CheckpointError."""
    plain = [each for each in networks if not each.average]
    if len(plain) != 1:
        raise CheckpointError(
            f"{where}: {place} is a list without names; the weights of the network beside it are needed, too"
        )
    names = list(plain[0].tensors)
    if len(values) != len(names):  # some lists are of what is trained alone
        names = [name for name in names if name != "pos_embed"]
    if [value.shape for value in values] != [plain[0].tensors[name].shape for name in names]:
        raise CheckpointError(f"{where}: {place} does not fit the weights of the network beside it")
    return Weights(place, True, dict(zip(names, values, strict=True)))
