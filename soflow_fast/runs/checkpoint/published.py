"""Directories in which weights are given away: config.json and safetensors, as the Hugging Face hub has them.

config.json has {"model", "flow", "data", "run"}: the network, the path and coefficients (and the objective, where it is
not SoFlow's), the identity of the data and what is known of the training, the latter two null where nothing is.
model.safetensors has the weights, manifest.json the SHA-256 of both; README.md may be edited and is in no manifest. The
folder `flow` of a pipeline is the same, its weights in diffusion_pytorch_model.safetensors and without a manifest, as
diffusers writes it.
"""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...config.schema import Config, DataConfig, ModelConfig, PolicyConfig, from_dict, to_dict
from ...config.validation import validate
from ...data import identity
from ...data.identity import Identity
from ...errors import CheckpointError
from ...files import TEXT, make_folder, read_file, sha256, sync, write_file
from ...flow import SolutionFlow
from ...training.state import build_flow
from .folder import MANIFEST, save_tensors
from .origin import Origin, from_values, published, to_values
from .reading import check_weights, damaged, manifest_digests, most_bytes, not_whole, tensors_of

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
PIPELINE, PART, PART_WEIGHTS = "model_index.json", "flow", "diffusion_pytorch_model.safetensors"
"""What a pipeline of diffusers is known by, its part that is a flow, and the weights in it."""
FILES = (CONFIG, MANIFEST, WEIGHTS, PART_WEIGHTS)
"""All that `read` looks at."""
DTYPES = (torch.float16, torch.bfloat16)
"""In which weights may be given away beside float32."""
MOST_BYTES = identity.MOST_BYTES + TEXT
"""Of config.json, which holds the identity of the data."""


def describe(flow: SolutionFlow, origin: Origin | None) -> dict[str, Any]:
    """The content of config.json. Raises ValueError if the network is none that `load` could build."""
    config = getattr(flow.network, "config", None)
    if not isinstance(config, ModelConfig):
        raise ValueError(f"flow: its network is a {type(flow.network).__name__}; only a DiT or a U-Net can be saved")
    if isinstance(config, PolicyConfig):
        raise ValueError("flow: is a policy, which `export` gives away, with what it was trained on")
    known = {"data": None, "run": None} if origin is None else to_values(published(origin))
    kind = {} if flow.objective == "soflow" else {"objective": flow.objective}  # which older versions do not know
    form = {"path": flow.path, "coefficients": flow.coefficients, **kind}
    return {"model": to_dict(config), "flow": form, **known}


def write(flow: SolutionFlow, folder: Path, origin: Origin | None) -> None:
    """Write config.json, model.safetensors and manifest.json to a folder, which is made if need be.

    Each file is there whole or as it was; one that does not fit the others is noticed by its SHA-256. Raises ValueError
    if there is something else in the folder, and OSError.
    """
    values = describe(flow, origin)
    weights = {name: value.detach().cpu().contiguous() for name, value in flow.state_dict().items()}
    wrong = next((name for name, value in weights.items() if not torch.isfinite(value).all()), "")
    if wrong:
        raise ValueError(f"flow: {wrong} is not finite")
    _check_place(folder)
    make_folder(folder)
    temporary = folder / f".{WEIGHTS}.partial-{os.getpid()}"
    try:
        save_tensors(weights, temporary)
        sync(temporary)
        os.replace(temporary, folder / WEIGHTS)
    finally:
        temporary.unlink(missing_ok=True)
    write_file(folder / CONFIG, (json.dumps(values, indent=2) + "\n").encode())
    digests = {name: sha256(folder / name) for name in (CONFIG, WEIGHTS)}
    write_file(folder / MANIFEST, (json.dumps({"sha256": digests}, indent=2) + "\n").encode())


def _check_place(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder {folder}: is a file")
    other = (folder / CONFIG).exists() and _values(folder) is None
    if other or (folder / "checkpoints").exists() or (folder / PIPELINE).exists():
        raise ValueError(f"folder {folder}: holds something else, such as a run; give another one")


def find(path: Path) -> Path | None:
    """The folder at or in a path that `read` can read; None: it is something else."""
    folder = path / PART if (path / PIPELINE).is_file() else path
    return None if _values(folder) is None else folder


def _values(folder: Path) -> dict[str, Any] | None:
    """What config.json says, if it is of this form."""
    try:
        values = json.loads(read_file(folder / CONFIG, MOST_BYTES, follow=True))
    except (OSError, ValueError, RecursionError):
        return None
    fits = isinstance(values, dict) and {"model", "flow"} <= values.keys() and "preset" not in values
    return values if fits else None


def read(folder: Path) -> tuple[SolutionFlow, Config, Identity | None]:
    """The flow in a folder that `find` has found, on the CPU in the dtype that it was saved in, with what is known.

    Its files may be links, as they are in the hub's cache. Raises CheckpointError.
    """
    manifest = _read(folder / MANIFEST, TEXT, None) if (folder / MANIFEST).exists() else None
    digests = None if manifest is None else manifest_digests(folder, manifest)
    values = json.loads(_read(folder / CONFIG, MOST_BYTES, digests))
    try:
        config, origin = _configuration(values), from_values(values)
    except ValueError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from None
    name = next((name for name in (WEIGHTS, PART_WEIGHTS) if (folder / name).exists()), WEIGHTS)
    weights = tensors_of(folder, {name: _read(folder / name, most_bytes(config), digests)}, name)
    flow = build_flow(config)
    check_weights(flow.state_dict(), weights, folder, DTYPES)
    flow.load_state_dict(weights, assign=True)
    flow.origin = origin
    return flow, config, None if origin is None else origin.data


def _read(path: Path, most: int, digests: dict[str, str] | None) -> bytes:
    """A file of which the manifest, if there is one, has the SHA-256. Raises CheckpointError."""
    try:
        content = read_file(path, most, follow=True)
    except OSError as error:
        raise not_whole(path.parent, error) from None
    if digests is not None and digests.get(path.name) != hashlib.sha256(content).hexdigest():
        raise damaged(path)
    return content


def _configuration(values: dict[str, Any]) -> Config:
    """The configuration that is known: of the run, or of its network alone. Raises ValueError."""
    given = {name: values[name] for name in ("model", "flow")}
    if isinstance(given["flow"], dict) and "objective" in given["flow"]:
        form = dict(given["flow"])
        given |= {"objective": {"kind": form.pop("objective")}, "flow": form}
    origin = from_values(values)
    if origin is None:
        config = from_dict(given, Config(preset="", data=DataConfig(kind="images")))
        if isinstance(config.model, PolicyConfig):
            raise ValueError("is a policy without its training, which says how observations and actions are normalised")
        latent = config.image_model.in_channels not in (1, 3)  # which are no colours
        if not config.model.null_label:
            config = replace(config, objective=replace(config.objective, guidance_scale=1.0, label_drop=0.0))
        return validate(replace(config, data=DataConfig(kind="latents")) if latent else config)
    return validate(from_dict(given, origin.config))
