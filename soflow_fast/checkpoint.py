"""Crash-safe checkpoints: a directory is either whole or not there, and a flipped bit is noticed on load.

RUN/checkpoints/step-00002500/ holds config.json, state.json, network.safetensors, ema.safetensors,
optimizer.safetensors and manifest.json with the SHA-256 of each. It is written beside its place under a temporary
name, synced to the disk and renamed; of a run, from a copy in host memory, in a thread beside the training (`saver`).
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save_file
from torch import Tensor

from .config import Config, from_json, to_json
from .errors import CheckpointError, printable
from .flow import SolutionFlow
from .state import TrainState, build_flow
from .validation import validate

T = TypeVar("T")

MANIFEST = "manifest.json"
FORMAT = 1


def directory(run_dir: Path) -> Path:
    """Where the checkpoints of a run are."""
    return run_dir / "checkpoints"


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds, in host memory of its own: training may go on while it is written."""

    step: int
    texts: dict[str, str]
    """Content by file name."""
    tensors: dict[str, dict[str, Tensor]]
    """Tensors by file name and by their name in it."""


def snapshot(state: TrainState) -> Snapshot:
    """A copy of `state` as it is now, taken from the device."""
    refused = state.guard.read()
    step = {"format": FORMAT, "step": state.step, "skipped": refused.skipped, "in_row": refused.in_row}
    tensors = {"network.safetensors": state.flow.state_dict(), "ema.safetensors": state.ema.state_dict()}
    if state.teacher is not None:
        tensors["teacher.safetensors"] = state.teacher.state_dict()
    tensors["optimizer.safetensors"] = _optimizer_tensors(state)
    copies = {
        file: {name: value.detach().to("cpu", copy=True).contiguous() for name, value in values.items()}
        for file, values in tensors.items()
    }
    return Snapshot(state.step, {"config.json": to_json(state.config), "state.json": json.dumps(step) + "\n"}, copies)


def save(run_dir: Path, state: TrainState, keep: int = 2) -> Path:
    """Write a checkpoint of `state`, then remove all but the `keep` newest. Raises OSError, leaving nothing behind."""
    return write(run_dir, snapshot(state), keep)


def write(run_dir: Path, content: Snapshot, keep: int, proceed: Callable[[], None] = lambda: None) -> Path:
    """`save` of a snapshot. `proceed` is called between its parts; what it raises ends it, leaving nothing behind."""
    final = directory(run_dir) / f"step-{content.step:08d}"
    with whole_directory(final, proceed) as folder:
        for name, text in content.texts.items():
            (folder / name).write_text(text)
        for name, tensors in content.tensors.items():
            proceed()
            _save_tensors(tensors, folder / name)
        for passed_over in list_checkpoints(run_dir):  # damaged ones: `resume` takes the newest that is whole
            if passed_over.name >= final.name:
                _remove(passed_over)
    for old in list_checkpoints(run_dir)[keep:]:
        _remove(old)
    return final


def _remove(folder: Path) -> None:
    """Remove a checkpoint so that a kill on the way leaves no part of it under its name."""
    aside = folder.with_name(f".partial-{folder.name}-removed-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)
    shutil.rmtree(aside)


def export(flow: SolutionFlow, config: Config, folder: str | os.PathLike) -> Path:
    """Write the weights of `flow` and its configuration to a directory that `load` reads.

    Raises ValueError if they do not belong together or the directory exists already.
    """
    wanted = {name: value.shape for name, value in build_flow(config).state_dict().items()}
    got = {name: value.shape for name, value in flow.state_dict().items()}
    for name in [*wanted, *got]:
        if wanted.get(name) != got.get(name):
            raise ValueError(f"flow and config do not belong together: {name} differs")
    if Path(folder).exists():
        raise ValueError(f"folder {folder} exists already")
    with whole_directory(Path(folder)) as temporary:
        (temporary / "config.json").write_text(to_json(config))
        weights = {name: value.detach().cpu().contiguous() for name, value in flow.state_dict().items()}
        _save_tensors(weights, temporary / "ema.safetensors")
    return Path(folder)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    found = directory(run_dir).glob("step-" + "[0-9]" * 8)
    return sorted((folder for folder in found if folder.is_dir()), reverse=True)


def resume(run_dir: Path, state: TrainState, warn: Callable[[str], None]) -> bool:
    """Put the newest whole checkpoint of a run into `state`; damaged ones are named to `warn` and passed over.

    False if the run has none. Raises CheckpointError if it has some and all are damaged.
    """
    for stale in directory(run_dir).glob(".partial-*"):
        shutil.rmtree(stale, ignore_errors=True)
    found = list_checkpoints(run_dir)
    if found:
        _newest_usable(found, lambda folder: restore(folder, state), warn)
    return bool(found)


def _newest_usable(found: list[Path], use: Callable[[Path], T], warn: Callable[[str], None]) -> T:
    """`use` of the first checkpoint that it takes, those before it told to `warn`. Raises CheckpointError if none."""
    refused: list[str] = []
    for folder in found:
        try:
            result = use(folder)
        except CheckpointError as error:
            refused.append(str(error))
        else:
            for text in refused:
                warn(f"{text}; using {folder.name} instead")
            return result
    raise CheckpointError(refused[0] + ("; no older one can be used either" if len(refused) > 1 else ""))


def restore(folder: Path, state: TrainState) -> None:
    """Put one checkpoint into `state`. Raises CheckpointError if it is damaged or of another model."""
    files = read_verified(folder)
    weights = {"network": state.flow, "ema": state.ema} | ({"teacher": state.teacher} if state.teacher else {})
    found = {name: _tensors(folder, files, f"{name}.safetensors") for name in weights}
    optimizer = _tensors(folder, files, "optimizer.safetensors")
    counts = _read_state(folder, files)
    for name, flow in weights.items():
        _load_weights(flow, found[name], folder)
    entries = _optimizer_entries(optimizer, [*state.flow.parameters()], folder)
    groups = state.optimizer.state_dict()["param_groups"]
    try:
        state.optimizer.load_state_dict({"state": entries, "param_groups": groups})
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: optimiser of another model: {error}") from None
    state.step = counts["step"]
    state.guard.restore(counts["skipped"], counts["in_row"])


def _optimizer_entries(tensors: dict[str, Tensor], parameters: list[Any], folder: Path) -> dict[int, dict[str, Tensor]]:
    """The optimiser's state by the number of the parameter. Raises CheckpointError if it is not of these parameters."""
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        known = index.isdecimal() and int(index) < len(parameters) and name in ("step", "exp_avg", "exp_avg_sq")
        shape = () if name == "step" else parameters[int(index)].shape if known else None
        if value.shape != shape or value.dtype != torch.float32:
            raise CheckpointError(f"{folder}: optimiser of another model: {key} does not fit")
        entries.setdefault(int(index), {})[name] = value
    for index, entry in entries.items():
        if len(entry) < 3:
            raise CheckpointError(f"{folder}: optimiser of another model: {index} has only {', '.join(entry)}")
    return entries


def _read_state(folder: Path, files: dict[str, bytes]) -> dict[str, int]:
    """The numbers of state.json. Raises CheckpointError if this version cannot read it."""
    try:
        values = {"skipped": 0, "in_row": 0, **json.loads(files["state.json"])}  # which older ones do not have
        found = {name: values[name] for name in ("format", "step", "skipped", "in_row")}
        if any(type(value) is not int or not 0 <= value < 10**8 for value in found.values()):
            raise ValueError(f"not counts: {found}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{folder / 'state.json'}: {type(error).__name__}: {error}") from None
    if found["format"] > FORMAT:
        raise CheckpointError(
            f"{folder}: of format {found['format']}; this version reads up to {FORMAT}, use a later one"
        )
    return found


def load(source: str | os.PathLike, device: str | torch.device = "cpu") -> SolutionFlow:
    """The EMA weights of a run's newest whole checkpoint, of one checkpoint, or of an exported directory.

    Returns a SolutionFlow in eval mode, without gradients. Raises CheckpointError if there is
    nothing to load or it is damaged; of a run, damaged checkpoints are passed over with a warning on stderr.
    """
    return load_with_config(source, device)[0]


def load_with_config(source: str | os.PathLike, device: str | torch.device = "cpu") -> tuple[SolutionFlow, Config]:
    """`load`, and the configuration that the weights were trained with."""
    path = Path(source)
    if not path.exists():
        raise CheckpointError(f"{path}: no such run or checkpoint")
    if (path / MANIFEST).exists():
        return _load_one(path, device)
    found = list_checkpoints(path)
    if not found:
        raise CheckpointError(f"{path}: holds no checkpoint")
    return _newest_usable(
        found,
        lambda folder: _load_one(folder, device),
        lambda text: print(f"soflow: warning: {printable(text)}", file=sys.stderr),
    )


def _load_one(folder: Path, device: str | torch.device) -> tuple[SolutionFlow, Config]:
    files = read_verified(folder)
    if "state.json" in files:  # an exported directory has none
        _read_state(folder, files)
    try:
        config = validate(from_json(files["config.json"].decode()))
    except KeyError:
        raise CheckpointError(f"{folder}: config.json is missing") from None
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
    flow = build_flow(config)
    _load_weights(flow, _tensors(folder, files, "ema.safetensors"), folder)
    return flow.to(device).eval().requires_grad_(False), config


def read_verified(folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint by name, each with the SHA-256 of the manifest. Raises CheckpointError."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        wanted = {str(name): str(digest) for name, digest in manifest["sha256"].items()}
        files = {name: (folder / name).read_bytes() for name in wanted if Path(name).name == name}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder}: not a whole checkpoint ({type(error).__name__}: {error})") from None
    for name, digest in wanted.items():
        if name not in files or hashlib.sha256(files[name]).hexdigest() != digest:
            raise CheckpointError(f"{folder / name}: damaged, its SHA-256 is not the manifest's")
    return files


@contextmanager
def whole_directory(final: Path, proceed: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """A temporary directory that becomes `final`, with a manifest, if the block ends well, and else goes.

    proceed: called between the parts; what it raises ends it as an error in the block does.
    """
    if not final.parent.is_dir():
        final.parent.mkdir(parents=True, exist_ok=True)
        _sync(final.parent.parent)
    temporary = final.parent / f".partial-{final.name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        digests: dict[str, str] = {}
        for file in sorted(temporary.iterdir()):
            proceed()
            digests[file.name] = _digest(file)
        (temporary / MANIFEST).write_text(json.dumps({"sha256": digests}, indent=2) + "\n")
        for file in temporary.iterdir():
            proceed()
            _sync(file)
        _sync(temporary)
        proceed()
        os.rename(temporary, final)
        _sync(final.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _digest(path: Path) -> str:
    """The SHA-256 of a file, which is not held in memory as a whole."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**22):
            digest.update(part)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # it reports a full disk in its own words
        raise OSError(getattr(error, "errno", None) or 5, str(error), str(path)) from None


def _optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    entries = state.optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, entry in entries.items() for name, value in entry.items()}


def _tensors(folder: Path, files: dict[str, bytes], name: str) -> dict[str, Tensor]:
    try:
        return parse_safetensors(files[name])
    except KeyError:
        raise CheckpointError(f"{folder}: {name} is missing") from None
    except SafetensorError as error:
        raise CheckpointError(f"{folder / name}: {error}") from None


def _load_weights(flow: SolutionFlow, weights: dict[str, Tensor], folder: Path) -> None:
    expected = flow.state_dict()
    for name in [*expected, *weights]:
        got, wanted = weights.get(name), expected.get(name)
        if got is None or wanted is None or (got.shape, got.dtype) != (wanted.shape, wanted.dtype):
            raise CheckpointError(f"{folder}: of another model: {name} does not fit")
    flow.load_state_dict(weights, assign=next(flow.parameters()).is_meta)
