"""Crash-safe checkpoints: a directory is either whole or not there, and a flipped bit is noticed on load.

RUN/checkpoints/step-00002500/ holds config.json, state.json, data.json (which data it was), network.safetensors,
ema.safetensors, optimizer.safetensors and manifest.json with the SHA-256 of each. It is written beside its place under
a temporary name, synced to the disk and renamed. During a run a thread writes it from a copy in host memory
(`async_save`).
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save_file
from torch import Tensor

from ..config.schema import Config, disagreement, from_json, to_json
from ..config.validation import validate
from ..data import identity
from ..data.identity import Identity
from ..errors import CheckpointError, Diverged, printable
from ..files import TEXT, make_folder, read_file, remove, set_aside, sha256, sync
from ..flow import SolutionFlow
from ..training.state import TrainState, build_flow

T = TypeVar("T")

MANIFEST = "manifest.json"
DATA = "data.json"
TEXTS = ("config.json", "state.json", DATA)
TENSORS = tuple(f"{name}.safetensors" for name in ("network", "ema", "teacher", "optimizer"))
FORMAT = 1


class LaterFormat(CheckpointError):
    """A checkpoint of a later version: not damaged, and no older one is to be used in its place."""


def directory(run_dir: Path) -> Path:
    """The folder of a run's checkpoints."""
    return run_dir / "checkpoints"


@dataclass(frozen=True)
class Snapshot:
    """The content of a checkpoint in host memory of its own: training may go on while it is written."""

    step: int
    texts: dict[str, str]
    """Content by file name."""
    tensors: dict[str, dict[str, Tensor]]
    """Tensors by file name and by their name in it."""


def snapshot(state: TrainState) -> Snapshot:
    """A copy of `state` as it is now, taken from the device. Raises Diverged if a number in it is not finite."""
    refused = state.guard.read()
    step = {"format": FORMAT, "step": state.step, "skipped": refused.skipped, "in_row": refused.in_row}
    tensors = {"network.safetensors": state.weights(), "ema.safetensors": state.ema.state_dict()}
    if state.teacher is not None:
        tensors["teacher.safetensors"] = state.teacher.state_dict()
    tensors["optimizer.safetensors"] = _optimizer_tensors(state)
    wrong = _first_not_finite({f"{file}: {name}": v for file, values in tensors.items() for name, v in values.items()})
    if wrong:
        raise Diverged(
            f"{wrong} not finite after step {state.step}; that state is not saved, and the last checkpoint stands"
        )
    copies = {
        file: {name: value.detach().to("cpu", copy=True).contiguous() for name, value in values.items()}
        for file, values in tensors.items()
    }
    texts = {"config.json": to_json(state.config), "state.json": json.dumps(step) + "\n"}
    if state.data:
        texts[DATA] = state.data
    return Snapshot(state.step, texts, copies)


@torch.no_grad()
def _first_not_finite(tensors: dict[str, Tensor]) -> str:
    """The name of the first tensor with a number that is not finite, "" if there is none.

    Made where the tensors are, of their extremes: no copy, and of a device one wait for all.
    """
    names = [name for name, value in tensors.items() if value.numel() and value.is_floating_point()]
    if not names:
        return ""
    device = tensors[names[0]].device
    extremes = [value.to(device) for name in names for value in tensors[name].detach().aminmax()]  # NaN is both
    finite = torch.isfinite(torch.stack(extremes)).view(-1, 2).all(1).tolist()
    return "" if all(finite) else names[finite.index(False)]


def _warn(text: str) -> None:
    print(f"soflow: warning: {printable(text)}", file=sys.stderr)


def save(run_dir: Path, state: TrainState, keep: int = 2) -> Path:
    """Write a checkpoint of `state`, then remove all but the `keep` newest.

    Checkpoints of this step or later ones, which a run that goes on from here has passed over, are renamed, not
    removed. Raises OSError, leaving nothing behind, and Diverged if a number in `state` is not finite.
    """
    return write(run_dir, snapshot(state), keep)


def write(
    run_dir: Path,
    content: Snapshot,
    keep: int,
    proceed: Callable[[], None] = lambda: None,
    warn: Callable[[str], None] = _warn,
) -> Path:
    """Write a snapshot, as `save` writes a state.

    `proceed` is called between its parts; an error that it raises ends the writing and leaves nothing behind. `warn` is
    told of old checkpoints that could not be removed.
    """
    final = directory(run_dir) / f"step-{content.step:08d}"
    with whole_directory(final, proceed) as folder:
        for name, text in content.texts.items():
            (folder / name).write_text(text)
        for name, tensors in content.tensors.items():
            proceed()
            _save_tensors(tensors, folder / name)
        for passed_over in list_checkpoints(run_dir):  # by `resume`, which takes the newest that it can use
            if passed_over.name >= final.name:
                set_aside(passed_over)
    for old in list_checkpoints(run_dir)[keep:]:
        try:
            _remove(old)
        except OSError as error:
            warn(f"old checkpoint {old} not removed: {error.strerror or error}")
    return final


def _remove(folder: Path) -> None:
    """Remove a checkpoint so that a kill on the way leaves no part of it under its name. Raises OSError."""
    aside = folder.with_name(f".partial-{folder.name}-removed-{os.getpid()}")
    remove(aside)
    os.rename(folder, aside)
    remove(aside)


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

    False if the run has none. Raises CheckpointError if it has some and all are damaged, or a later version's.
    """
    place = directory(run_dir)
    if os.path.lexists(place) and not place.is_dir():
        what = "a link to what is not there" if place.is_symlink() else "no folder"
        raise CheckpointError(f"{place}: is {what}; is a disk not mounted?")
    for stale in place.glob(".partial-*"):
        with suppress(OSError):
            remove(stale)
    found = list_checkpoints(run_dir)
    if found:
        _newest_usable(found, lambda folder: restore(folder, state), warn)
    return bool(found)


def _newest_usable(found: list[Path], use: Callable[[Path], T], warn: Callable[[str], None]) -> T:
    """The result of `use` on the first checkpoint that it accepts; `warn` is told of those before it.

    Raises CheckpointError if it accepts none, LaterFormat for the first one of a later version.
    """
    refused: list[str] = []
    for folder in found:
        try:
            result = use(folder)
        except LaterFormat:
            raise
        except CheckpointError as error:
            refused.append(str(error))
        else:
            for text in refused:
                warn(f"{text}; using {folder.name} instead")
            return result
    raise CheckpointError(refused[0] + ("; no older one can be used either" if len(refused) > 1 else ""))


def restore(folder: Path, state: TrainState) -> None:
    """Put one checkpoint into `state`. Raises CheckpointError if it is damaged, of another run or not finite."""
    files = read_verified(folder)
    known = _config(folder, files)
    finished = "state.json" in files and _read_state(folder, files)["step"] == known.steps
    changed = disagreement(known, state.config, finished=finished)
    if changed:
        raise CheckpointError(f"{folder}: of a run with another configuration ({'; '.join(changed)})")
    data = _identity(folder, files)
    if data is not None and state.data and (other := identity.changes(data, identity.from_json(state.data))):
        raise CheckpointError(f"{folder}: of a run on other data ({'; '.join(other)})")
    averages = {"ema": state.ema} | ({"teacher": state.teacher} if state.teacher else {})
    found = {name: _tensors(folder, files, f"{name}.safetensors") for name in ("network", *averages)}
    optimizer = _tensors(folder, files, "optimizer.safetensors")
    counts = _read_state(folder, files)
    entries = _optimizer_entries(optimizer, [*state.flow.parameters()], folder, begun=counts["step"] > 0)
    _check_weights(state.weights(), found["network"], folder)
    for name, flow in averages.items():
        _load_weights(flow, found[name], folder)
    groups = state.optimizer.state_dict()["param_groups"]
    try:
        state.optimizer.load_state_dict({"state": entries, "param_groups": groups})
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: optimiser of another model: {error}") from None
    state.load_weights(found["network"])  # after the optimiser, whose masters they are
    state.step = counts["step"]
    state.guard.restore(counts["skipped"], counts["in_row"])


def _optimizer_entries(
    tensors: dict[str, Tensor], parameters: list[Any], folder: Path, *, begun: bool
) -> dict[int, dict[str, Tensor]]:
    """The optimiser's state by the number of the parameter; before the first step there may be none.

    Raises CheckpointError if it is not of these parameters.
    """
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        known = re.fullmatch(r"([0-9]{1,6})\.(step|exp_avg|exp_avg_sq)", key)
        index, name = (int(known[1]), known[2]) if known else (len(parameters), "")
        shape = None if index >= len(parameters) else () if name == "step" else parameters[index].shape
        if shape is None or value.shape != shape or value.dtype != torch.float32:
            raise CheckpointError(f"{folder}: optimiser of another model: {key[:60]} does not fit")
        entries.setdefault(index, {})[name] = value
    for index, entry in entries.items():
        if len(entry) < 3:
            raise CheckpointError(f"{folder}: optimiser of another model: {index} has only {', '.join(entry)}")
    if len(entries) < len(parameters) and (entries or begun):
        raise CheckpointError(f"{folder}: optimiser of {len(entries)} weights, the model has {len(parameters)}")
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
        raise LaterFormat(f"{folder}: of format {found['format']}; this version reads up to {FORMAT}, use a later one")
    named = re.fullmatch(r"step-(\d{8})", folder.name)
    if named and int(named[1]) != found["step"]:
        raise CheckpointError(f"{folder / 'state.json'}: is of step {found['step']}")
    return found


def _identity(folder: Path, files: dict[str, bytes]) -> Identity | None:
    """The identity of the data in a checkpoint; None: older ones have none. Raises CheckpointError."""
    if DATA not in files:
        return None
    try:
        return identity.from_json(files[DATA])
    except ValueError as error:
        raise CheckpointError(f"{folder / DATA}: {error}") from None


def _config(folder: Path, files: dict[str, bytes]) -> Config:
    """The configuration in a checkpoint. Raises CheckpointError."""
    try:
        return validate(from_json(files["config.json"].decode()))
    except KeyError:
        raise CheckpointError(f"{folder}: config.json is missing") from None
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None


def load(source: str | os.PathLike, device: str | torch.device = "cpu") -> SolutionFlow:
    """The EMA weights of a run's newest whole checkpoint, of one checkpoint, or of an exported directory.

    Returns a SolutionFlow in eval mode, without gradients. Raises CheckpointError if there is
    nothing to load or it is damaged; of a run, damaged checkpoints are passed over with a warning on stderr.
    """
    return load_with_config(source, device)[0]


def load_with_config(source: str | os.PathLike, device: str | torch.device = "cpu") -> tuple[SolutionFlow, Config]:
    """Load weights as `load` does, with the configuration that they were trained with."""
    return load_with_data(source, device)[:2]


def load_with_data(
    source: str | os.PathLike, device: str | torch.device = "cpu"
) -> tuple[SolutionFlow, Config, Identity | None]:
    """Load weights as `load` does, with their configuration and the identity of their data, if it is known."""
    path = Path(source)
    if not path.exists():
        raise CheckpointError(f"{path}: no such run or checkpoint")
    if (path / MANIFEST).exists():
        return _load_one(path, device)
    while True:
        found = list_checkpoints(path)
        if not found:
            raise CheckpointError(f"{path}: holds no checkpoint")
        try:
            return _newest_usable(found, lambda folder: _load_one(folder, device), _warn)
        except CheckpointError:
            if all(folder.is_dir() for folder in found):
                raise
            # The run goes on: newer checkpoints have pushed these out while they were read.


def _load_one(folder: Path, device: str | torch.device) -> tuple[SolutionFlow, Config, Identity | None]:
    files = read_verified(folder)
    config = _config(folder, files)
    flow = build_flow(config)
    _load_weights(flow, _tensors(folder, files, "ema.safetensors"), folder)
    return flow.to(device).eval().requires_grad_(False), config, _identity(folder, files)


def read_verified(folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint by name, each with the SHA-256 of the manifest.

    Raises CheckpointError, of a later version's checkpoint LaterFormat.
    """
    try:
        manifest = json.loads(read_file(folder / MANIFEST, TEXT))
        wanted = {str(name): str(digest) for name, digest in manifest["sha256"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder}: not a whole checkpoint ({type(error).__name__}: {error})") from None
    # The texts come first: they say what may be there, and how long it may be.
    lengths = {DATA: identity.MOST_BYTES}
    files = {name: _read_one(folder / name, lengths.get(name, TEXT), wanted[name]) for name in TEXTS if name in wanted}
    if "state.json" in files:  # an exported directory has none
        _read_state(folder, files)
    for name in wanted:
        if name not in (*TEXTS, *TENSORS):
            raise CheckpointError(f"{folder}: damaged, its manifest names {name[:60]!r}")
    most = _most_bytes(_config(folder, files))
    return files | {name: _read_one(folder / name, most, wanted[name]) for name in TENSORS if name in wanted}


def _read_one(path: Path, most: int, digest: str) -> bytes:
    """A file with this SHA-256. Raises CheckpointError."""
    try:
        content = read_file(path, most)
    except OSError as error:
        raise CheckpointError(f"{path.parent}: not a whole checkpoint ({type(error).__name__}: {error})") from None
    if hashlib.sha256(content).hexdigest() != digest:
        raise CheckpointError(f"{path}: damaged, its SHA-256 is not the manifest's")
    return content


def _most_bytes(config: Config) -> int:
    """The most bytes of a file of tensors: both moments in float32, and names of any sensible length."""
    weights = [*build_flow(config).state_dict().values()]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(8 * sum(w.numel() for w in weights) + 1024 * len(weights) + 2**20, memory)


@contextmanager
def whole_directory(final: Path, proceed: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """A temporary directory that becomes `final`, with a manifest, if the block ends well, and else goes.

    proceed: is called between the parts; an error that it raises ends the writing as one in the block does.
    """
    make_folder(final.parent)
    temporary = final.parent / f".partial-{final.name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        digests: dict[str, str] = {}
        for file in sorted(temporary.iterdir()):
            proceed()
            digests[file.name] = sha256(file)
        (temporary / MANIFEST).write_text(json.dumps({"sha256": digests}, indent=2) + "\n")
        for file in temporary.iterdir():
            proceed()
            sync(file)
        sync(temporary)
        proceed()
        os.rename(temporary, final)
        sync(final.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path)
        path.chmod(mode)  # it makes a file that its owner alone can read
    except SafetensorError as error:  # it reports a full disk in its own words
        raise OSError(getattr(error, "errno", None) or 5, str(error), str(path)) from None


def _optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    """The optimiser's state by number of the parameter and name; the masters are kept as the network's weights."""
    entries = state.optimizer.state_dict()["state"]
    named = ((index, name, value) for index, entry in entries.items() for name, value in entry.items())
    return {f"{index}.{name}": value for index, name, value in named if name != "master"}


def _tensors(folder: Path, files: dict[str, bytes], name: str) -> dict[str, Tensor]:
    """The tensors of a file, all finite. Raises CheckpointError."""
    if name not in files:
        raise CheckpointError(f"{folder}: {name} is missing")
    try:
        found = parse_safetensors(files[name])
    except KeyError as error:
        raise CheckpointError(f"{folder / name}: holds numbers of a kind that is not known here: {error}") from None
    except (SafetensorError, ValueError, TypeError, RuntimeError, RecursionError) as error:
        raise CheckpointError(f"{folder / name}: {error}") from None
    wrong = _first_not_finite({key: value for key, value in found.items() if value.dtype == torch.float32})
    if wrong:
        raise CheckpointError(f"{folder / name}: {wrong} is not finite")
    return found


def _check_weights(expected: dict[str, Tensor], weights: dict[str, Tensor], folder: Path) -> None:
    for name in [*expected, *weights]:
        got, wanted = weights.get(name), expected.get(name)
        if got is None or wanted is None or (got.shape, got.dtype) != (wanted.shape, wanted.dtype):
            raise CheckpointError(f"{folder}: of another model: {name[:60]} does not fit")


def _load_weights(flow: SolutionFlow, weights: dict[str, Tensor], folder: Path) -> None:
    _check_weights(flow.state_dict(), weights, folder)
    flow.load_state_dict(weights, assign=next(flow.parameters()).is_meta)
