"""Checkpoints of format 2: every rank writes parts of them, by torch.distributed.checkpoint.

shard-RRRRR-model-KKKKK-of-NNNNN.safetensors holds what rank R - 1 has written of one kind of tensors, KINDS[K - 1], by
KIND.NAME; where a part belongs in its tensor stands in the file's header. What several ranks hold one of them writes.
The ranks share a file system, and nothing is pickled on it.
"""

import errno
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import (
    CheckpointException,
    DefaultLoadPlanner,
    DefaultSavePlanner,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.futures import Future

from ...errors import CheckpointError, Diverged
from ...files import sha256, sync
from ...training.parallel import Parallel
from .folder import begin, commit
from .reading import WIDE, damaged, first_not_finite, local, not_whole, unknown_name
from .together import together

KINDS = ("network", "ema", "optimizer", "teacher")
"""What is kept, in the order of the files' numbers."""
FILE = re.compile(r"shard-(\d{5,})-model-(\d{5})-of-\d{5}\.safetensors")


@dataclass(frozen=True)
class Parts:
    """What one rank writes of a checkpoint, in host memory of its own: training may go on meanwhile."""

    step: int
    texts: dict[str, str]
    """Content by file name, which the first rank writes."""
    tensors: dict[str, Tensor]
    """This rank's parts, by KIND.NAME: DTensors on the ranks' mesh in host memory, and tensors that it writes alone."""
    numbers: dict[str, int]
    """The number of the file of every tensor, also of those that others write."""
    parallel: Parallel


def take_parts(
    parallel: Parallel, step: int, texts: dict[str, str], tensors: Mapping[str, Mapping[str, Tensor]]
) -> Parts:
    """Copies of this rank's share of `tensors`, by kind and name, while all ranks take theirs.

    Raises Diverged on all of them if one holds a number that is not finite.
    """
    named = {f"{kind}.{name}": value for kind in KINDS for name, value in tensors.get(kind, {}).items()}
    copies: dict[str, Tensor] = {}

    def take() -> None:
        if wrong := first_not_finite(named):
            kind, _, name = wrong.partition(".")
            what = f"{parallel.name(parallel.rank)}: {kind}: {name} not finite after step {step}"
            raise Diverged(f"{what}; that state is not saved, and the last checkpoint stands")
        for name in _dealt_to(parallel, named):
            copies[name] = _on_host(named[name], parallel.host_mesh)

    together(parallel, take)
    numbers = {name: KINDS.index(name.partition(".")[0]) + 1 for name in named}
    return Parts(step, texts, copies, numbers, parallel)


def _dealt_to(parallel: Parallel, named: Mapping[str, Tensor]) -> list[str]:
    """The tensors of which this rank writes what it has: every part is written once, and no rank writes much more than
    another. The ranks of a replica write the same tensors, each its own part."""
    sharded = {name: value for name, value in named.items() if isinstance(value, DTensor)}
    whole = {name: value for name, value in named.items() if name not in sharded}
    mesh = parallel.host_mesh
    replica = mesh.get_local_rank("replicate") if "replicate" in (mesh.mesh_dim_names or ()) else 0
    chosen = [name for name, part in _deal(sharded, parallel.replicas).items() if part == replica]
    chosen = [name for name in chosen if local(named[name]).numel()]
    return chosen + [name for name, part in _deal(whole, parallel.world).items() if part == parallel.rank]


def _deal(tensors: Mapping[str, Tensor], parts: int) -> dict[str, int]:
    """A part for each: the largest tensors first, each to the part with the least."""
    loads, dealt = [0] * parts, {}
    for name in sorted(tensors, key=lambda name: (-tensors[name].nbytes, name)):
        dealt[name] = loads.index(min(loads))
        loads[dealt[name]] += tensors[name].nbytes
    return dealt


def _on_host(value: Tensor, mesh: DeviceMesh) -> Tensor:
    copy = local(value).detach().to("cpu", copy=True).contiguous()
    return _parts_of(value, copy, mesh) if isinstance(value, DTensor) else copy


def _parts_of(like: DTensor, part: Tensor, mesh: DeviceMesh) -> DTensor:
    """A DTensor that is cut as another one is, with this rank's part of it."""
    return DTensor.from_local(
        part, mesh, like.placements, run_check=False, shape=like.shape, stride=tuple(like.stride())
    )


def write(
    final: Path, content: Parts, pass_over: Callable[[], None], proceed: Callable[[], None], group: Any = None
) -> None:
    """Write a checkpoint while all ranks write it. It is there, whole, when this returns.

    Its files lie on the disk before the first rank renames it. pass_over: is called by that rank at the last moment.
    proceed: is called between the parts. An error on one rank ends the writing on all, as `together` says, and leaves
    nothing behind; a rank that has died does so as a RuntimeError of the others, and the next start removes the rest.
    group: the process group that the ranks talk in; None: that of all.
    """
    parallel = content.parallel
    first = parallel.rank == 0
    temporary: Path | None = None

    def make() -> str:
        nonlocal temporary
        proceed()
        if first:
            temporary = begin(final)
            for name, text in content.texts.items():
                (temporary / name).write_text(text)
        return temporary.name if temporary else ""

    def hashed() -> dict[str, str]:
        if fault is not None:
            raise fault
        found: dict[str, str] = {}
        for file in sorted(folder.glob(f"shard-{parallel.rank + 1:05d}-*")):
            proceed()
            found[file.name] = sha256(file)
            sync(file)
        return found

    def settle() -> None:
        if first:
            digests = {name: sha256(folder / name) for name in content.texts}
            for found in shards:
                digests |= found
            for name in digests:
                if not (folder / name).exists():
                    why = "is not seen by all ranks; do they share the file system?"
                    raise OSError(errno.ENOENT, why, str(folder / name))
            commit(folder, final, digests, content.texts, proceed, pass_over)

    try:
        folder = final.parent / together(parallel, make, group)[0]
        fault = _save(folder, content, proceed, group)
        shards = together(parallel, hashed, group)
        together(parallel, settle, group)
    except BaseException:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _save(folder: Path, content: Parts, proceed: Callable[[], None], group: Any) -> BaseException | None:
    """Write this rank's shards; the error that it met there, if any."""
    writer = _Writer(str(folder), content.numbers)
    try:
        dcp.save(content.tensors, storage_writer=writer, planner=_Planner(proceed), process_group=group)
    except CheckpointException as error:
        raise RuntimeError(f"{content.parallel.name(min(error.failures))}: {_first_line(error)}") from error
    return writer.fault


class _Writer(HuggingFaceStorageWriter):
    """Keeps an error instead of handing it, and its traceback, to the other ranks: not every error can be pickled, and
    one that cannot would leave them waiting."""

    def __init__(self, folder: str, numbers: dict[str, int]) -> None:
        super().__init__(folder, fqn_to_index_mapping=numbers, save_distributed=True)
        self.per_thread_copy_ahead = 0  # nothing is on a GPU, and this thread has no device set to wait for
        self.fault: BaseException | None = None

    def write_data(self, plan: Any, planner: Any) -> Future[list[Any]]:
        # torch 2.10 warns of itself here. The filter stays: to take it back in a thread may undo another thread's.
        warnings.filterwarnings("ignore", "TypedStorage is deprecated", module=r"torch\.distributed\.checkpoint")
        try:
            return super().write_data(plan, planner)
        except BaseException as error:
            self.fault = error
            nothing: Future[list[Any]] = Future()
            nothing.set_result([])
            return nothing


class _Planner(DefaultSavePlanner):
    """Calls `proceed` before each tensor."""

    def __init__(self, proceed: Callable[[], None]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.proceed = proceed

    def resolve_data(self, write_item: Any) -> Any:
        self.proceed()
        return super().resolve_data(write_item)


def verify(folder: Path, digests: Mapping[str, str], most: int, part: int = 0, parts: int = 1) -> None:
    """Raise CheckpointError unless the shards are those of the manifest, SHA-256 by file name.

    most: the bytes that a file may have. part, parts: which share of the files is read; all are looked for.
    """
    for name in digests:
        if not FILE.fullmatch(name):
            raise unknown_name(folder, name)
    try:
        there = {file.name for file in folder.iterdir() if file.name.endswith(".safetensors")}
    except OSError as error:
        raise not_whole(folder, error) from None
    for name in sorted(there ^ digests.keys()):
        what = "is not in its manifest" if name in there else "is missing"
        raise CheckpointError(f"{folder}: damaged, {name[:60]} {what}")
    for name in sorted(digests, key=_by_number)[part::parts]:
        try:
            wrong = sha256(folder / name, most) != digests[name]
        except OSError as error:
            raise not_whole(folder, error) from None
        if wrong:
            raise damaged(folder / name)


def _by_number(name: str) -> tuple[str, str]:
    """Files of one kind, which are of about one size, side by side: shares of all files are then alike."""
    return name.split("-")[3], name


class Shards:
    """The tensors of a checkpoint whose files are verified. Raises CheckpointError if they cannot be read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self._reader = _Reader(str(folder))
        except Exception as error:  # of a disk, of safetensors, or of a header that somebody else has written
            raise CheckpointError(f"{folder}: {_first_line(error)}") from None
        self._known = self._reader.metadata.state_dict_metadata

    def holds(self, kind: str) -> bool:
        """Whether there is a tensor of this kind."""
        return any(name.startswith(f"{kind}.") for name in self._known)

    def read(
        self, wanted: Mapping[str, Mapping[str, Tensor]], mesh: DeviceMesh | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """New tensors in host memory, by kind and name, whole where those of `wanted` are and else cut as they are.

        mesh: the ranks' in host memory. Raises CheckpointError if what is there is not as wanted, or not finite.
        """
        for kind, likes in wanted.items():
            self._check(kind, likes)
        into = {f"{kind}.{name}": _empty(like, mesh) for kind in wanted for name, like in wanted[kind].items()}
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each rank reads for itself
                dcp.load(dict(into), storage_reader=self._reader, planner=planner, no_dist=True)
        except (CheckpointException, Exception) as error:
            raise CheckpointError(f"{self.folder}: {_first_line(error)}") from None
        if wrong := first_not_finite({n: v for n, v in into.items() if v.dtype in WIDE}):
            raise CheckpointError(f"{self.folder}: {wrong} is not finite")
        return {kind: {name: into[f"{kind}.{name}"] for name in wanted[kind]} for kind in wanted}

    def _check(self, kind: str, likes: Mapping[str, Tensor]) -> None:
        if not self.holds(kind):
            raise CheckpointError(f"{self.folder}: {kind} is missing")
        theirs = [name.removeprefix(f"{kind}.") for name in self._known if name.startswith(f"{kind}.")]
        for name in [*likes, *theirs]:
            like, known = likes.get(name), self._known.get(f"{kind}.{name}")
            if (
                like is None
                or not isinstance(known, TensorStorageMetadata)
                or (known.size, known.properties.dtype) != (like.shape, like.dtype)
            ):
                raise CheckpointError(f"{self.folder}: of another model: {kind}: {name[:60]} does not fit")
            if not _is_whole(known):
                raise CheckpointError(f"{self.folder}: the parts of {kind}: {name[:60]} do not fit together")


class _Reader(HuggingFaceStorageReader):
    """Reads the headers of all files once, at the start."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.metadata = super().read_metadata()

    def read_metadata(self) -> Metadata:
        return self.metadata


def _is_whole(known: TensorStorageMetadata) -> bool:
    """Whether the parts of a tensor, which is cut along its first dimension, cover it once."""
    if not known.size:
        return len(known.chunks) == 1
    end = 0
    for chunk in sorted(known.chunks, key=lambda chunk: chunk.offsets[0]):
        if chunk.offsets[0] != end or any(chunk.offsets[1:]) or chunk.sizes[1:] != known.size[1:]:
            return False
        end += chunk.sizes[0]
    return end == known.size[0]


def _empty(like: Tensor, mesh: DeviceMesh | None) -> Tensor:
    empty = torch.empty(local(like).shape, dtype=like.dtype)
    if not isinstance(like, DTensor):
        return empty
    assert mesh is not None
    return _parts_of(like, empty, mesh)


def placed(value: Tensor, like: Tensor, mesh: DeviceMesh) -> Tensor:
    """A tensor in host memory, whole or of parts, as `like` is: this rank's part of it, on the device of `like`.

    Without a word between the ranks, which all hold a tensor that is whole. mesh: the ranks' in host memory.
    """
    if not isinstance(like, DTensor):
        return value
    if not isinstance(value, DTensor):
        value = distribute_tensor(value, mesh, like.placements, src_data_rank=None)
    return _parts_of(like, local(value).to(like.device), like.device_mesh)


def _first_line(error: BaseException) -> str:
    """What went wrong, of torch's many lines the one that says it."""
    if isinstance(error, CheckpointException):
        return _first_line(error.failures[min(error.failures)][0])
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
