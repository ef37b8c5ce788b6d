"""What the texts of a checkpoint say, and whether its tensors are those of a model."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from torch import Tensor

from ...config.schema import Config, from_json
from ...config.validation import validate
from ...data import identity
from ...data.identity import Identity
from ...errors import CheckpointError
from ...files import TEXT, read_file
from ...training.optimizer import AVERAGE
from ...training.state import build_flow
from .folder import MANIFEST

DATA = "data.json"
TEXTS = ("config.json", "state.json", DATA)
WHOLE, SHARDED = 1, 2
"""The formats: a file for all that belongs together, or many, each written by one of several processes."""
FORMAT = SHARDED
"""The latest one that is known."""


class LaterFormat(CheckpointError):
    """A checkpoint of a later version: not damaged, and no older one is to be used in its place."""


def read_texts(folder: Path) -> tuple[dict[str, bytes], dict[str, str]]:
    """The texts of a checkpoint by file name, each with the SHA-256 of the manifest, and those of its other files.

    Raises CheckpointError, of a later version's checkpoint LaterFormat.
    """
    try:
        content = read_file(folder / MANIFEST, TEXT)
    except OSError as error:
        raise not_whole(folder, error) from None
    digests = manifest_digests(folder, content)
    # The texts come first: they say what else may be there, and how long it may be.
    lengths = {DATA: identity.MOST_BYTES}
    wanted = [name for name in TEXTS if name in digests]
    texts = {name: read_one(folder / name, lengths.get(name, TEXT), digests.pop(name)) for name in wanted}
    if "state.json" in texts:  # an exported directory has none
        read_counts(folder, texts)
    return texts, digests


def manifest_digests(folder: Path, content: bytes) -> dict[str, str]:
    """The SHA-256 by file name in the content of a folder's manifest. Raises CheckpointError."""
    try:
        return {str(name): str(digest) for name, digest in json.loads(content)["sha256"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise not_whole(folder, error) from None


WIDE = (torch.float32, torch.float64)
"""Dtypes of numbers that a run has computed."""


def not_whole(folder: Path, error: Exception) -> CheckpointError:
    """The error of a checkpoint of which something cannot be read."""
    return CheckpointError(f"{folder}: not a whole checkpoint ({type(error).__name__}: {error})")


def damaged(path: Path) -> CheckpointError:
    """The error of a file that is not as it was written."""
    return CheckpointError(f"{path}: damaged, its SHA-256 is not the manifest's")


def unknown_name(folder: Path, name: str) -> CheckpointError:
    """The error of a manifest with a file that a checkpoint does not have."""
    return CheckpointError(f"{folder}: damaged, its manifest names {name[:60]!r}")


def read_one(path: Path, most: int, digest: str) -> bytes:
    """A file with this SHA-256. Raises CheckpointError."""
    try:
        content = read_file(path, most)
    except OSError as error:
        raise not_whole(path.parent, error) from None
    if hashlib.sha256(content).hexdigest() != digest:
        raise damaged(path)
    return content


def read_counts(folder: Path, texts: dict[str, bytes]) -> dict[str, int]:
    """The numbers of state.json. Raises CheckpointError if this version cannot read it."""
    try:
        values = {"skipped": 0, "in_row": 0, **json.loads(texts["state.json"])}  # which older ones do not have
        found = {name: values[name] for name in ("format", "step", "skipped", "in_row")}
        if any(type(value) is not int or not 0 <= value < 10**8 for value in found.values()):
            raise ValueError(f"not counts: {found}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{folder / 'state.json'}: {type(error).__name__}: {error}") from None
    if found["format"] > FORMAT:
        raise LaterFormat(f"{folder}: of format {found['format']}; this version reads up to {FORMAT}, use a later one")
    named = re.fullmatch(r"step-(\d{8})", folder.name)
    if named and int(named[1]) != found["step"]:
        raise CheckpointError(f"{folder / 'state.json'}: is of step {found['step']}")
    return found


def is_sharded(folder: Path, texts: dict[str, bytes]) -> bool:
    """Whether the tensors of a checkpoint lie in many files. Raises CheckpointError."""
    return "state.json" in texts and read_counts(folder, texts)["format"] == SHARDED


def read_identity(folder: Path, texts: dict[str, bytes]) -> Identity | None:
    """The identity of the data in a checkpoint; None: older ones have none. Raises CheckpointError."""
    if DATA not in texts:
        return None
    try:
        return identity.from_json(texts[DATA])
    except ValueError as error:
        raise CheckpointError(f"{folder / DATA}: {error}") from None


def read_config(folder: Path, texts: dict[str, bytes]) -> Config:
    """The configuration in a checkpoint. Raises CheckpointError."""
    try:
        return validate(from_json(texts["config.json"].decode()))
    except KeyError:
        raise CheckpointError(f"{folder}: config.json is missing") from None
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None


def most_bytes(config: Config) -> int:
    """The most bytes of a file of tensors: both moments in float32, an average in float64 where there is one, and names
    of any sensible length."""
    weights = [*build_flow(config).state_dict().values()]
    size = 16 if config.optim.ema_precision == "fp64" else 8
    return size * sum(w.numel() for w in weights) + 1024 * len(weights) + 2**20


@torch.no_grad()
def first_not_finite(tensors: dict[str, Tensor]) -> str:
    """The name of the first tensor with a number that is not finite in what this process holds of it, "" if none has.

    Made where the tensors are, of their extremes: no copy, and of a device one wait for all.
    """
    parts = {name: local(value).detach() for name, value in tensors.items()}
    names = [name for name, value in parts.items() if value.numel() and value.is_floating_point()]
    if not names:
        return ""
    device = parts[names[0]].device
    extremes = [value.to(device) for name in names for value in parts[name].aminmax()]  # NaN is both
    finite = torch.isfinite(torch.stack(extremes)).view(-1, 2).all(1).tolist()
    return "" if all(finite) else names[finite.index(False)]


def local(value: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    part: Any = value
    return part.to_local() if hasattr(part, "to_local") else value  # a DTensor, whose import takes its time


def tensors_of(folder: Path, files: dict[str, bytes], name: str) -> dict[str, Tensor]:
    """The tensors of a file, all finite. Raises CheckpointError."""
    if name not in files:
        raise CheckpointError(f"{folder}: {name} is missing")
    try:
        found = parse_safetensors(files[name])
    except KeyError as error:
        raise CheckpointError(f"{folder / name}: holds numbers of a kind that is not known here: {error}") from None
    except (SafetensorError, ValueError, TypeError, RuntimeError, RecursionError) as error:
        raise CheckpointError(f"{folder / name}: {error}") from None
    wrong = first_not_finite({key: value for key, value in found.items() if value.dtype in WIDE})
    if wrong:
        raise CheckpointError(f"{folder / name}: {wrong} is not finite")
    return found


def check_weights(
    expected: dict[str, Tensor], weights: dict[str, Tensor], folder: Path, dtypes: tuple[torch.dtype, ...] = ()
) -> None:
    """Raise CheckpointError if these are not the tensors of the model. dtypes: in which they may be as well."""
    for name in [*expected, *weights]:
        got, wanted = weights.get(name), expected.get(name)
        if got is None or wanted is None or got.shape != wanted.shape or got.dtype not in (wanted.dtype, *dtypes):
            raise CheckpointError(f"{folder}: of another model: {name[:60]} does not fit")


def optimizer_entries(
    tensors: dict[str, Tensor], parameters: list[Any], folder: Path, *, begun: bool, wide: bool = False
) -> dict[int, dict[str, Tensor]]:
    """The optimiser's state by the number of the parameter; before the first step there may be none.

    wide: it holds a float64 average of each parameter, too. Raises CheckpointError if it is not of these parameters.
    """
    dtypes = dict.fromkeys(("step", "exp_avg", "exp_avg_sq"), torch.float32) | (
        {AVERAGE: torch.float64} if wide else {}
    )
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        known = re.fullmatch(rf"([0-9]{{1,6}})\.({'|'.join(dtypes)})", key)
        index, name = (int(known[1]), known[2]) if known else (len(parameters), "")
        shape = None if index >= len(parameters) else () if name == "step" else parameters[index].shape
        if shape is None or value.shape != shape or value.dtype != dtypes[name]:
            raise CheckpointError(f"{folder}: optimiser of another model: {key[:60]} does not fit")
        entries.setdefault(index, {})[name] = value
    for index, entry in entries.items():
        if len(entry) < len(dtypes):
            raise CheckpointError(f"{folder}: optimiser of another model: {index} has only {', '.join(entry)}")
    if len(entries) < len(parameters) and (entries or begun):
        raise CheckpointError(f"{folder}: optimiser of {len(entries)} weights, the model has {len(parameters)}")
    return entries
