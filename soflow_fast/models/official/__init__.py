"""Checkpoints of the authors' public trainer (zlab-princeton/SoFlow) and of DiT and SiT: reading what others wrote.

`load_official` is the way in. A file is read by `torch_file`, its weights are found by `wrapped`, their shape is told
by `shapes` and the authors' config.yaml (`config.authors`); `moments` and `one_time` are for runs that begin with it.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...config.authors import from_authors, is_theirs, read_yaml
from ...config.schema import Coefficients, Config, DiTConfig, FlowPath, ModelConfig, UNetConfig
from ...config.validation import validate_model
from ...errors import CheckpointError
from ...files import TEXT, read_file
from ...flow import SolutionFlow
from .. import network_of
from ..dit import DiT, sincos_positions
from . import moments, one_time, shapes, song_unet, torch_file
from .wrapped import Weights, find_average, find_network

CHECKPOINTS = "ckpts"
"""The folder of files in the working directory of their trainer, beside config.yaml."""


@dataclass(frozen=True)
class Start:
    """What a run begins with: weights by the names of `SolutionFlow.state_dict`, float32, to be copied: those of a file
    are parts of it, which are read as they are used."""

    network: dict[str, Tensor]
    average: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    """By name: "step", "exp_avg", "exp_avg_sq"; none where only weights are asked for or no step was made."""
    step: int = 0
    groups: tuple[Mapping[str, Any], ...] = ()
    """The settings of the optimiser's groups of parameters."""


def load_official(
    source: str | os.PathLike | Mapping[str, Any],
    config: ModelConfig | str | os.PathLike | None = None,
    *,
    path: FlowPath | None = None,
    coefficients: Coefficients | None = None,
    num_classes: int | None = None,
) -> SolutionFlow:
    """A SolutionFlow in eval mode from the authors' checkpoint.

    Args:
        source: a file written by torch.save, or a state dict with keys `network...`; or either one wrapped in a dict
            with entries such as "model" and "ema_model", of which the averaged weights are taken. Of a file nothing is
            executed, and what is not used is not read.
        config: the network's shape, or their config.yaml; None: the config.yaml beside the file, or beside the folder
            `ckpts` that it lies in; else inferred from the weights, which works for their U-Net and for the public
            sizes of the DiT (the number of heads of another one cannot be seen in its weights).
        path, coefficients: those of SolutionFlow; None: of the config.yaml, else "linear" and "euler".
        num_classes: where the label table does not tell: n + 1 rows are n classes and the null label, or n + 1 classes
            of a training that never dropped a label. Of such a network `sample(flow, None)` is a ValueError.

    Raises:
        CheckpointError: if the file is missing, unreadable or its weights do not fit, or if config contradicts them.
    """
    where = "the state dict" if isinstance(source, Mapping) else os.fspath(source)
    weights = find_average(source if isinstance(source, Mapping) else torch_file.read(where), where)
    known = config_of(source, config) if not isinstance(config, ModelConfig) else None
    if known is not None:
        path, coefficients = _agreed(known, path, coefficients, where)
    model = shape_of(weights, where, known.model if known else config, num_classes)
    if known is not None and isinstance(known.model, DiTConfig) and model.null_label != known.model.null_label:
        rows = known.model.num_classes + known.model.null_label
        raise CheckpointError(f"{where}: its config.yaml asks for a label table of {rows} rows, which it has not")
    flow = SolutionFlow(_on_meta(model), path or "linear", coefficients or "euler")
    tensors = song_unet.named(weights.tensors, model, where) if isinstance(model, UNetConfig) else weights
    flow.load_state_dict(checked(tensors, flow, where, own=True), assign=True)
    return flow.eval()


def config_of(source: str | os.PathLike | Mapping[str, Any], config: Any = None) -> Config | None:
    """Their config.yaml as ours: the given one, or the one that belongs to a file; None: there is none.

    Raises CheckpointError for one that cannot be read.
    """
    given = isinstance(config, str | os.PathLike)
    if given:
        places = [Path(config)]
    elif isinstance(source, Mapping):
        return None
    else:
        folder = Path(os.path.abspath(source)).parent
        above = [folder.parent / "config.yaml"] if folder.name == CHECKPOINTS else []
        places = [folder / "config.yaml", *above]
    for place in places:
        try:
            text = read_file(place, TEXT, follow=True).decode()
            if given or is_theirs(text):
                return from_authors(read_yaml(text))
        except OSError as error:
            if given:
                raise CheckpointError(f"{place}: {error.strerror or error}") from None
        except ValueError as error:
            raise CheckpointError(f"{place}: {error}") from None
    return None


def _agreed(
    known: Config, path: FlowPath | None, coefficients: Coefficients | None, where: str
) -> tuple[FlowPath, Coefficients]:
    """Path and coefficients of their configuration. Raises CheckpointError if others were given."""
    for name, given, theirs in (
        ("path", path, known.flow.path),
        ("coefficients", coefficients, known.flow.coefficients),
    ):
        if given not in (None, theirs):
            raise CheckpointError(f"{where}: {name} {given!r} was given, its config.yaml says {theirs!r}")
    return known.flow.path, known.flow.coefficients


def shape_of(weights: Weights, where: str, config: Any = None, num_classes: int | None = None) -> ModelConfig:
    """The shape of a network: `config` with a null label as the label table has it, or as its weights show."""
    if song_unet.is_song_unet(weights.tensors):
        if isinstance(config, DiTConfig):
            raise CheckpointError(f"{where}: holds a U-Net, the configuration is a DiT's")
        if num_classes:
            raise CheckpointError(f"{where}: holds a U-Net, which has no classes")
        found = song_unet.fitted(config or song_unet.infer(weights.tensors, where), weights.tensors, where)
        try:
            validate_model(found)
        except ValueError as error:  # sizes that no U-Net here has
            raise CheckpointError(f"{where}: {error}") from None
        return found
    if isinstance(config, UNetConfig):
        raise CheckpointError(f"{where}: holds a DiT, the configuration is a U-Net's")
    if one_time.is_one_time(weights.tensors):
        raise CheckpointError(
            f"{where}: a DiT or SiT, whose network sees one time: train --init takes it, with --set run.init_kind"
        )
    if config is None:
        return shapes.infer(weights.tensors, where, num_classes)
    if num_classes is not None:
        config = replace(config, num_classes=num_classes)
    return shapes.fitted(config, weights.tensors, where)


def _on_meta(config: ModelConfig) -> Any:
    with torch.device("meta"):
        return network_of(config)


def checked(
    weights: Weights | Mapping[str, Tensor], flow: SolutionFlow, where: str, *, own: bool = False
) -> dict[str, Tensor]:
    """Weights in float32, by the names of `flow.state_dict`; own: in memory of their own, whatever they were.

    Raises CheckpointError naming what does not fit.
    """
    tensors = weights.tensors if isinstance(weights, Weights) else weights
    expected = flow.state_dict()
    given = {f"network.{name}": value for name, value in tensors.items()}
    if "network.pos_embed" not in given and isinstance(flow.network, DiT):
        grid = flow.network.config.input_size // flow.network.config.patch_size
        positions = sincos_positions(flow.network.config.hidden_size, grid)
        given["network.pos_embed"] = positions.view(expected["network.pos_embed"].shape)
    for name in sorted({*expected, *given}):
        if name not in given:
            raise CheckpointError(f"{where}: {name} is missing")
        if name not in expected:
            raise CheckpointError(f"{where}: {name} has no place in the model")
        if given[name].shape != expected[name].shape:
            got, wanted = list(given[name].shape), list(expected[name].shape)
            raise CheckpointError(f"{where}: {name} is {got}, the model's is {wanted}")
    found = {name: given[name].detach().to("cpu", torch.float32, copy=own) for name in expected}
    return {name: value.contiguous() for name, value in found.items()} if own else found


def _unet_weights(
    weights: Weights, config: ModelConfig, kind: one_time.Kind | None, with_moments: bool, where: str
) -> dict[str, Tensor]:
    """The weights of a U-Net for a run of `config`, by their names in it."""
    model = shape_of(weights, where, config)
    assert isinstance(model, UNetConfig)
    if kind is not None:
        raise CheckpointError(f"{where}: is no {kind}: a U-Net")
    if with_moments:
        raise CheckpointError(f"{where}: a U-Net's moments are not taken over; begin with its weights, --init")
    return song_unet.named(weights.tensors, model, where)


def read_start(
    where: str,
    config: Config,
    *,
    kind: one_time.Kind | None = None,
    initial: Mapping[str, Tensor] | None = None,
    with_moments: bool = False,
) -> Start:
    """What a run of `config` begins with, of a file: weights, averages, and moments and step where they are asked for.

    kind: of a network that sees one time. initial: the weights with which the run would begin, by the names of
    `SolutionFlow.state_dict`; needed for those, and for a run with a range of guidance scales. Raises CheckpointError
    if they do not fit the configuration.
    """
    content = torch_file.read(where)
    found = {"network": find_network(content, where), "average": find_average(content, where)}
    flow = SolutionFlow(_on_meta(config.model), config.flow.path, config.flow.coefficients)
    known = config_of(where)
    if known is not None and kind is None:
        _agreed(known, config.flow.path, config.flow.coefficients, where)
    own: dict[str, dict[str, Tensor]] = {}
    plain = {key.removeprefix("network."): value for key, value in (initial or {}).items()}
    for name, weights in found.items():
        tensors: Mapping[str, Tensor] = weights.tensors
        if isinstance(config.model, UNetConfig) or song_unet.is_song_unet(tensors):
            own[name] = checked(_unet_weights(weights, config.model, kind, with_moments, where), flow, where)
            continue
        model = shapes.fitted(config.dit, tensors, where)
        if model.null_label != config.dit.null_label:
            row = "a row for the null label" if model.null_label else "no row for the null label"
            raise CheckpointError(
                f"{where}: its label table has {row}; give --set model.null_label={str(model.null_label).lower()}"
            )
        if model.qk_norm != config.dit.qk_norm:
            norms = "norms of queries and keys" if model.qk_norm else "no norms of queries and keys"
            raise CheckpointError(f"{where}: has {norms}; give --set model.qk_norm={str(model.qk_norm).lower()}")
        if one_time.is_one_time(tensors):
            if kind is None:
                raise CheckpointError(
                    f"{where}: its network sees one time; say what it is, --set run.init_kind=dit or sit"
                )
            tensors = one_time.with_two_times(tensors, kind, flow, plain, where)
        elif kind is not None:
            raise CheckpointError(f"{where}: is no {kind}: its network sees two times already")
        if config.model.guidance_range is not None and one_time.W_EMBEDDER not in tensors:
            tensors = {**tensors, **one_time.silent_embedder("w_embedder", plain)}
        own[name] = checked(tensors, flow, where)
    if not with_moments:
        return Start(own["network"], own["average"], {})
    step = content.get("finished_steps")
    if type(step) is not int or step < 0:
        raise CheckpointError(f"{where}: does not say how many steps it has made (finished_steps)")
    state = moments.named(content, found["network"], where)
    if step and not state:
        raise CheckpointError(f"{where}: holds no moments of an optimiser, after {step} steps")
    groups = content["optimizer"]["param_groups"]
    settings = tuple({key: value for key, value in group.items() if key != "params"} for group in groups)
    entries = {f"network.{name}": {k: v.clone() for k, v in entry.items()} for name, entry in state.items()}
    return Start(own["network"], own["average"], entries, step, settings)
