"""Crash-safe checkpoints: a directory is either whole or not there, and a flipped bit is noticed on load.

RUN/checkpoints/step-00002500/ holds config.json, state.json, data.json (which data it was), network.safetensors,
ema.safetensors, optimizer.safetensors and manifest.json with the SHA-256 of each. It is written beside its place under
a temporary name, synced to the disk and renamed. During a run a thread writes it from a copy in host memory
(`async_save`). Several ranks write their parts of it (`sharded`); any number of them, or one process, reads either.
"""

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ...config.schema import Config, disagreement, to_json
from ...data import identity
from ...data.identity import Identity
from ...errors import CheckpointError, Diverged, printable
from ...files import remove, set_aside
from ...flow import SolutionFlow
from ...models.official import Start
from ...training.optimizer import AVERAGE
from ...training.state import TrainState, build_flow
from . import origin, published
from .folder import MANIFEST, directory, list_checkpoints, remove_checkpoint, save_tensors, whole_directory
from .foreign import load_official_run, official_file
from .reading import (
    DATA,
    FORMAT,
    SHARDED,
    WHOLE,
    LaterFormat,
    check_weights,
    first_not_finite,
    is_sharded,
    most_bytes,
    optimizer_entries,
    read_config,
    read_counts,
    read_identity,
    read_one,
    read_texts,
    tensors_of,
    unknown_name,
)
from .together import together

if TYPE_CHECKING:
    from .sharded import Parts

__all__ = [
    "FORMAT",
    "LaterFormat",
    "Snapshot",
    "Whole",
    "begin_with",
    "directory",
    "export",
    "is_flow",
    "list_checkpoints",
    "load",
    "load_whole",
    "load_with_config",
    "load_with_data",
    "of_newest",
    "official_file",
    "read_verified",
    "restore",
    "resume",
    "save",
    "snapshot",
    "whole_directory",
    "write",
]

T = TypeVar("T")

TENSORS = tuple(f"{name}.safetensors" for name in ("network", "ema", "teacher", "optimizer"))


@dataclass(frozen=True)
class Snapshot:
    """The content of a checkpoint in host memory of its own: training may go on while it is written."""

    step: int
    texts: dict[str, str]
    """Content by file name."""
    tensors: dict[str, dict[str, Tensor]]
    """Tensors by file name and by their name in it."""


@dataclass(frozen=True)
class Whole:
    """A checkpoint in host memory; of an exported directory the averaged weights are both."""

    config: Config
    data: Identity | None
    step: int
    network: dict[str, Tensor]
    ema: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    """"step", "exp_avg" and "exp_avg_sq" by the name of the parameter."""


def snapshot(state: TrainState) -> "Snapshot | Parts":
    """A copy of `state` as it is now, taken from the device; of several ranks, each one's part, which all take at the
    same time. Raises Diverged if a number in it is not finite, on whichever rank."""
    refused = state.guard.read()
    parallel = state.parallel
    form = WHOLE if parallel is None else SHARDED
    step = {"format": form, "step": state.step, "skipped": refused.skipped, "in_row": refused.in_row}
    texts = {"config.json": to_json(state.config), "state.json": json.dumps(step) + "\n"}
    if state.data:
        texts[DATA] = state.data
    tensors = {"network": state.weights(), "ema": state.ema.state_dict()}
    if state.teacher is not None:
        tensors["teacher"] = state.teacher.state_dict()
    tensors["optimizer"] = _optimizer_tensors(state)
    if parallel is not None:
        from .sharded import take_parts

        return take_parts(parallel, state.step, texts, tensors)
    files = {f"{kind}.safetensors": values for kind, values in tensors.items()}
    wrong = first_not_finite({f"{file}: {name}": v for file, values in files.items() for name, v in values.items()})
    if wrong:
        raise Diverged(
            f"{wrong} not finite after step {state.step}; that state is not saved, and the last checkpoint stands"
        )
    copies = {
        file: {name: value.detach().to("cpu", copy=True).contiguous() for name, value in values.items()}
        for file, values in files.items()
    }
    return Snapshot(state.step, texts, copies)


def _warn(text: str) -> None:
    print(f"soflow: warning: {printable(text)}", file=sys.stderr)


def save(run_dir: Path, state: TrainState, keep: int = 2) -> Path:
    """Write a checkpoint of `state`, then remove all but the `keep` newest. All ranks of a run call it.

    Checkpoints of this step or later ones, which a run that goes on from here has passed over, are renamed, not
    removed. Raises OSError, leaving nothing behind, and Diverged if a number in `state` is not finite.
    """
    return write(run_dir, snapshot(state), keep)


def write(
    run_dir: Path,
    content: "Snapshot | Parts",
    keep: int,
    proceed: Callable[[], None] = lambda: None,
    warn: Callable[[str], None] = _warn,
    group: Any = None,
) -> Path:
    """Write a snapshot, as `save` writes a state.

    `proceed` is called between its parts; an error that it raises ends the writing and leaves nothing behind. `warn` is
    told of old checkpoints that could not be removed. group: the process group in which several ranks talk of it;
    None: that of all.
    """
    final = directory(run_dir) / f"step-{content.step:08d}"

    def pass_over() -> None:  # what `resume` has, which takes the newest that it can use
        for later in list_checkpoints(run_dir):
            if later.name >= final.name:
                set_aside(later)

    if not isinstance(content, Snapshot):
        from . import sharded

        sharded.write(final, content, pass_over, proceed, group)
        if content.parallel.rank:
            return final
    else:
        proceed()
        with whole_directory(final, proceed, pass_over) as folder:
            for name, text in content.texts.items():
                (folder / name).write_text(text)
            for name, tensors in content.tensors.items():
                proceed()
                save_tensors(tensors, folder / name)
    for old in list_checkpoints(run_dir)[keep:]:
        try:
            remove_checkpoint(old)
        except OSError as error:
            warn(f"old checkpoint {old} not removed: {error.strerror or error}")
    return final


def export(flow: SolutionFlow, config: Config, folder: str | os.PathLike, data: Identity | None = None) -> Path:
    """Write the weights of `flow` and its configuration to a directory that `load` reads.

    data: what it was trained on, for the names of classes and for the VAE of latents.
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
        if data is not None:
            (temporary / DATA).write_text(identity.to_json(data))
        weights = {name: value.detach().cpu().contiguous() for name, value in flow.state_dict().items()}
        save_tensors(weights, temporary / "ema.safetensors")
    return Path(folder)


def resume(run_dir: Path, state: TrainState, warn: Callable[[str], None]) -> bool:
    """Put the newest whole checkpoint of a run into `state`; damaged ones are named to `warn` and passed over.

    All ranks of a run call it and take the same one. False if the run has none. Raises CheckpointError if it has some
    and all are damaged, or a later version's.
    """
    parallel = state.parallel

    def look() -> list[str]:
        if parallel is not None and parallel.rank:
            return []
        place = directory(run_dir)
        if os.path.lexists(place) and not place.is_dir():
            what = "a link to what is not there" if place.is_symlink() else "no folder"
            raise CheckpointError(f"{place}: is {what}; is a disk not mounted?")
        for stale in place.glob(".partial-*"):
            with suppress(OSError):
                remove(stale)
        return [folder.name for folder in list_checkpoints(run_dir)]

    found = [directory(run_dir) / name for name in together(parallel, look)[0]]
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
    """Put one checkpoint into `state`; all ranks of a run do so. Raises CheckpointError, on all of them, if it is
    damaged, of another run or not finite, and then `state` is as it was."""
    parallel = state.parallel
    part, parts = (0, 1) if parallel is None else (parallel.rank, parallel.world)
    read: dict[str, bytes] = {}
    found: dict[str, dict[str, Tensor]] = {}
    entries: dict[int, dict[str, Tensor]] = {}

    def verify() -> None:
        read.update(read_verified(folder, part, parts))
        _check_belongs(folder, read, state)

    def take() -> None:
        found.update(_tensors_like(folder, read, state))
        parameters, begun = [*state.flow.parameters()], read_counts(folder, read)["step"] > 0
        wide = _is_wide(state.config)
        entries.update(optimizer_entries(found["optimizer"], parameters, folder, begun=begun, wide=wide))
        for kind, expected in _expected(state).items():
            check_weights(expected, found[kind], folder)

    together(parallel, verify)
    together(parallel, take)
    counts = read_counts(folder, read)
    _put(state, found, entries, str(folder))
    state.step = counts["step"]
    state.guard.restore(counts["skipped"], counts["in_row"])


def begin_with(state: TrainState, start: Start, where: str) -> None:
    """Put the weights, averages, moments and step of somebody's training into `state`, a teacher apart; all ranks of a
    run do so. where: the file that they are of, for CheckpointError."""
    numbers = enumerate(name for name, _ in state.flow.named_parameters())
    entries = {number: dict(start.moments[name]) for number, name in numbers if start.moments}
    _put(state, {"network": start.network, "ema": start.average}, entries, where)
    state.step = start.step


def _put(
    state: TrainState, found: dict[str, dict[str, Tensor]], entries: dict[int, dict[str, Tensor]], where: str
) -> None:
    """Set the weights of a state, by kind and name, and its optimiser's entries, by the number of the parameter."""
    parallel = state.parallel
    if parallel is not None:
        from .sharded import placed

        mesh, parameters, all_expected = parallel.host_mesh, [*state.flow.parameters()], _expected(state)
        for kind, tensors in found.items():
            if kind in all_expected:
                expected = all_expected[kind]
                found[kind] = {name: placed(value, expected[name], mesh) for name, value in tensors.items()}
        for index, entry in entries.items():
            moments = {name: placed(value, parameters[index], mesh) for name, value in entry.items() if name != "step"}
            entries[index] = entry | moments
    state.ema.load_state_dict(found["ema"])
    if state.teacher is not None and "teacher" in found:
        state.teacher.load_state_dict(found["teacher"])
    groups = state.optimizer.state_dict()["param_groups"]
    try:
        state.optimizer.load_state_dict({"state": entries, "param_groups": groups})
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{where}: optimiser of another model: {error}") from None
    state.load_weights(found["network"])  # after the optimiser, whose masters they are


def _check_belongs(folder: Path, files: dict[str, bytes], state: TrainState) -> None:
    """Raise CheckpointError if a checkpoint is of another run."""
    known = read_config(folder, files)
    finished = "state.json" in files and read_counts(folder, files)["step"] == known.steps
    changed = disagreement(known, state.config, finished=finished)
    if changed:
        raise CheckpointError(f"{folder}: of a run with another configuration ({'; '.join(changed)})")
    data = read_identity(folder, files)
    if data is not None and state.data and (other := identity.changes(data, identity.from_json(state.data))):
        raise CheckpointError(f"{folder}: of a run on other data ({'; '.join(other)})")


def _expected(state: TrainState) -> dict[str, dict[str, Tensor]]:
    """The weights of a state, by kind and name."""
    averages = {"ema": state.ema} | ({"teacher": state.teacher} if state.teacher else {})
    return {"network": state.weights()} | {kind: flow.state_dict() for kind, flow in averages.items()}


def _tensors_like(folder: Path, files: dict[str, bytes], state: TrainState) -> dict[str, dict[str, Tensor]]:
    """The tensors of a checkpoint that `state` has, in host memory; of one of many files, the parts that it has."""
    expected = _expected(state)
    if not is_sharded(folder, files):
        return {kind: tensors_of(folder, files, f"{kind}.safetensors") for kind in (*expected, "optimizer")}
    from .sharded import Shards

    parallel, shards = state.parallel, Shards(folder)
    if not shards.holds("optimizer") and not read_counts(folder, files)["step"]:
        moments = {}
    else:
        moments = {"optimizer": _moments(state.flow, state.config)}
    return {"optimizer": {}} | shards.read(expected | moments, None if parallel is None else parallel.host_mesh)


def _is_wide(config: Config) -> bool:
    """Whether the optimiser's state holds a float64 average of each parameter."""
    return config.optim.ema_precision == "fp64"


def _moments(flow: SolutionFlow, config: Config) -> dict[str, Tensor]:
    """Tensors of the shapes that the optimiser's state has once a step is made, by their names in a checkpoint."""
    found: dict[str, Tensor] = {}
    for index, p in enumerate(flow.parameters()):
        moment = p.detach() if p.dtype == torch.float32 else torch.empty(p.shape, device="meta")
        found |= {f"{index}.exp_avg": moment, f"{index}.exp_avg_sq": moment}
        found[f"{index}.step"] = torch.empty((), device="meta")
        if _is_wide(config):
            found[f"{index}.{AVERAGE}"] = torch.empty(p.shape, device="meta", dtype=torch.float64)
    return found


def load(source: str | os.PathLike, device: str | torch.device = "cpu") -> SolutionFlow:
    """The EMA weights of a run's newest whole checkpoint or of one checkpoint, those of a directory that `export` or
    `save_pretrained` has written, or of a file or working directory of the authors' trainer.

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
    theirs = official_file(path)
    if theirs is not None:
        flow, config, data = load_official_run(theirs)
        flow.origin = origin.Origin(config, data)
        return flow.to(device).requires_grad_(False), config, data
    if (place := published.find(path)) is not None:
        flow, config, data = published.read(place)
        return flow.to(device).eval().requires_grad_(False), config, data
    return of_newest(path, lambda folder: _load_one(folder, device))


def is_flow(folder: Path) -> bool:
    """Whether a folder is, or may be meant as, what `load` reads; a folder of images is not."""
    known = official_file(folder) or published.find(folder) or list_checkpoints(folder)
    return bool(known) or any((folder / name).exists() for name in (MANIFEST, "config.json"))


def of_newest(path: Path, use: Callable[[Path], T]) -> T:
    """The result of `use` on a checkpoint or exported directory, or on the newest checkpoint of a run that it accepts.

    Raises CheckpointError if there is none; damaged ones are passed over with a warning on stderr.
    """
    if (path / MANIFEST).exists():
        return use(path)
    while True:
        found = list_checkpoints(path)
        if not found:
            raise CheckpointError(f"{path}: holds no checkpoint")
        try:
            return _newest_usable(found, use, _warn)
        except CheckpointError:
            if all(folder.is_dir() for folder in found):
                raise
            # The run goes on: newer checkpoints have pushed these out while they were read.


def _load_one(folder: Path, device: str | torch.device) -> tuple[SolutionFlow, Config, Identity | None]:
    files = read_verified(folder)
    config = read_config(folder, files)
    flow = build_flow(config)
    if is_sharded(folder, files):
        from .sharded import Shards

        weights = Shards(folder).read({"ema": flow.state_dict()})["ema"]
    else:
        weights = tensors_of(folder, files, "ema.safetensors")
    check_weights(flow.state_dict(), weights, folder)
    flow.load_state_dict(weights, assign=True)
    data = read_identity(folder, files)
    step = read_counts(folder, files)["step"] if "state.json" in files else None
    flow.origin = origin.of_checkpoint(folder, config, data, step)
    return flow.to(device).eval().requires_grad_(False), config, data


def load_whole(source: str | os.PathLike) -> Whole:
    """All of a run's newest whole checkpoint, or of one checkpoint, in host memory; of a directory that `export` or
    `save_pretrained` has written what it has. Raises CheckpointError as `load` does."""
    path = Path(source)
    if not path.exists():
        raise CheckpointError(f"{path}: no such run or checkpoint")
    if (place := published.find(path)) is not None:
        flow, config, data = published.read(place)
        weights = flow.float().state_dict()
        return Whole(config, data, 0, weights, weights, {})
    return of_newest(path, _load_whole)


def _load_whole(folder: Path) -> Whole:
    files = read_verified(folder)
    config = read_config(folder, files)
    flow = build_flow(config)
    expected = flow.state_dict()
    begun = "state.json" in files
    step = read_counts(folder, files)["step"] if begun else 0
    kinds = ("network", "ema", "optimizer") if begun else ("ema",)
    if is_sharded(folder, files):
        from .sharded import Shards

        shards = Shards(folder)
        moments = {"optimizer": _moments(flow, config)} if step or shards.holds("optimizer") else {}
        found = {"optimizer": {}} | shards.read({"network": expected, "ema": expected} | moments)
    else:
        found = {kind: tensors_of(folder, files, f"{kind}.safetensors") for kind in kinds}
    ema, network = found["ema"], found.get("network", found["ema"])
    for weights in (ema, network):
        check_weights(expected, weights, folder)
    entries = {}
    if begun:
        parameters, wide = [*flow.parameters()], _is_wide(config)
        entries = optimizer_entries(found["optimizer"], parameters, folder, begun=step > 0, wide=wide)
    names = [name for name, _ in flow.named_parameters()]
    by_name = {
        names[index]: {part: value for part, value in entry.items() if part != AVERAGE}
        for index, entry in entries.items()
    }
    return Whole(config, read_identity(folder, files), step, network, ema, by_name)


def read_verified(folder: Path, part: int = 0, parts: int = 1) -> dict[str, bytes]:
    """The files of a checkpoint by name, each with the SHA-256 of the manifest; of one of many files the texts alone.

    part, parts: which share of many files is verified. Raises CheckpointError, of a later version's checkpoint
    LaterFormat.
    """
    texts, others = read_texts(folder)
    if is_sharded(folder, texts):
        from .sharded import verify

        verify(folder, others, most_bytes(read_config(folder, texts)), part, parts)
        return texts
    for name in others:
        if name not in TENSORS:
            raise unknown_name(folder, name)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    most = min(most_bytes(read_config(folder, texts)), memory)
    return texts | {name: read_one(folder / name, most, others[name]) for name in TENSORS if name in others}


def _optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    """The optimiser's state by number of the parameter and name; the masters are kept as the network's weights."""
    entries = state.optimizer.state_dict()["state"]
    named = ((index, name, value) for index, entry in entries.items() for name, value in entry.items())
    return {f"{index}.{name}": value for index, name, value in named if name != "master"}
