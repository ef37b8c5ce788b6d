"""Tar shards as WebDataset writes them: members of one name up to its first dot are one sample, an image and its label.

The convention is that of https://github.com/webdataset/webdataset; tar is POSIX.1-2001 and GNU's, uncompressed. Images
are read out of the shards by their place in them, so nothing is unpacked and memory holds an index only.
"""

import json
import os
import re
import tarfile
import weakref
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch

from ..errors import DataError, printable
from ._arrays import reason
from ._shards import folders_of_shards, is_tar, shards_of, tars_in
from .dataset import Dataset, Unreadable, Wanted
from .images import image_set
from .images.listing import IMAGES, is_nobodys

LABELS = ("label", "class", "cls")
"""Under which of these a .json holds the label."""
LARGEST_MEMBER = 64 * 2**20
LARGEST_JSON = 2**20
LARGEST_HEADER = 2**20
LARGEST_LABEL = 99_999
HANDLES = 256
"""Shards that are kept open."""
TELL_EVERY = 100_000
NONE = -1


class Names(Sequence[str]):
    """Many texts in one piece of memory."""

    def __init__(self, texts: bytes, ends: np.ndarray) -> None:
        self._texts, self._ends = texts, ends

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> list[str]: ...
    def __getitem__(self, number: int | slice) -> str | list[str]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        start = int(self._ends[number - 1]) if number else 0
        return self._texts[start : int(self._ends[number])].decode("utf-8", "surrogateescape")


class TarFiles:
    """The images of tar shards, by number: a shard, and the place and bytes in it, int64 [N] each.

    A shard is opened when it is first read from. Reads share no position, so that processes that are forked and threads
    may use one object; one that is pickled opens its shards anew.
    """

    def __init__(
        self,
        shards: list[Path],
        states: list[tuple[int, int]],
        shard: np.ndarray,
        offsets: np.ndarray,
        sizes: np.ndarray,
        names: Sequence[str],
    ) -> None:
        """states: bytes and time of each shard, when its members were found."""
        self.shards, self.states = shards, states
        self.shard, self.offsets, self.sizes, self.names = shard, offsets, sizes, names
        self._opened: dict[int, int] = {}
        weakref.finalize(self, _close, self._opened)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        weakref.finalize(self, _close, self._opened)

    def read(self, number: int) -> bytes:
        """Raises OSError for a shard that is gone or has changed."""
        shard = int(self.shard[number])
        if _state(os.stat(self.shards[shard])) != self.states[shard]:
            raise Unreadable("cannot be read: the shard has changed since it was opened")
        handle, kept = self._handle(shard)
        try:
            content = _piece(handle, int(self.offsets[number]), int(self.sizes[number]))
        finally:
            if not kept:
                os.close(handle)
        if len(content) < int(self.sizes[number]):
            raise Unreadable("cannot be read: the shard is cut off")
        return content

    def _handle(self, shard: int) -> tuple[int, bool]:
        """A handle of a shard, and whether it is kept."""
        handle = self._opened.get(shard)
        if handle is not None:
            return handle, True
        handle = os.open(self.shards[shard], os.O_RDONLY | os.O_CLOEXEC)
        if len(self._opened) >= HANDLES:
            return handle, False
        return handle, self._opened.setdefault(shard, handle) == handle


def _close(opened: dict[int, int]) -> None:
    for handle in opened.values():
        os.close(handle)


def recognises(place: Path) -> bool:
    """Whether it is a tar, a folder of tars that holds no folders, or a folder of such folders."""
    try:
        if place.is_file():
            return is_tar(place)
        return any(is_tar(shard) for folder in folders_of_shards(place) for shard in tars_in(folder))
    except (OSError, ValueError):
        return False


def load(place: Path, wanted: Wanted) -> Dataset:
    """The samples of one shard or of all in a folder, in the order of the shards' names, numbers in them as numbers.

    A label is an integer, from .cls or from .json; the classes are all numbers up to the highest one. Raises DataError
    for shards that are damaged, cut off or compressed, for members that are no files or lie outside of the shard, and
    for a sample without a label where others have one.
    """
    where = f"--data {place}"
    left_out: Counter[str] = Counter()
    try:
        shards, left_out = ([place], left_out) if place.is_file() else shards_of(place, where)
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({reason(error)})") from None
    if not shards:
        raise DataError(f"{where}: holds no .tar files")
    found, states = _Index(), []
    told = 0
    for number, shard in enumerate(shards):
        inside = where if shard == place else f"{where}: {printable(shard.name)}"
        samples, state = _members(shard, inside, left_out)
        states.append(state)
        found.add(number, shard.name, samples)
        if len(found.sizes) >= told + TELL_EVERY:
            told = len(found.sizes)
            wanted.say(f"{told} samples in {number + 1} of {len(shards)} shards")
    files = TarFiles(shards, states, *found.arrays())
    if not len(files.sizes):
        raise DataError(f"{where}: holds no images ({', '.join(sorted(IMAGES))})")
    labels = torch.from_numpy(np.array(found.labels, np.int64))
    missing = (labels == NONE).nonzero().flatten()
    if 0 < len(missing) < len(labels):
        raise DataError(f"{where}: {printable(files.names[int(missing[0])])} has no label, others have one")
    classes = () if len(missing) else tuple(map(str, range(int(labels.max()) + 1)))
    many = "1 tar shard" if len(shards) == 1 else f"{len(shards)} tar shards"
    return image_set(
        files,
        labels.clamp(min=0),
        classes,
        wanted,
        kind=f"WebDataset in {many}",
        left_out=left_out,
        notes=[] if classes else ["no sample has a label"],
        where=str(place),
        stamp=repr([(shard.name, *state) for shard, state in zip(shards, states, strict=True)]),
    )


class _Sample:
    """What is known of a sample while its shard is read."""

    __slots__ = ("cls", "image", "json", "offset", "size")

    def __init__(self) -> None:
        self.image, self.offset, self.size, self.cls, self.json = "", 0, 0, NONE, NONE


class _Index:
    """Samples of all shards, in as few bytes as may be."""

    def __init__(self) -> None:
        self.shard, self.offsets, self.sizes, self.labels, self.ends = (array("q") for _ in range(5))
        self.texts = bytearray()

    def add(self, number: int, name: str, samples: dict[str, _Sample]) -> None:
        for sample in samples.values():
            self.shard.append(number)
            self.offsets.append(sample.offset)
            self.sizes.append(sample.size)
            self.labels.append(sample.json if sample.cls == NONE else sample.cls)
            self.texts += f"{name}/{sample.image}".encode("utf-8", "surrogateescape")
            self.ends.append(len(self.texts))

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, Names]:
        shard, offsets, sizes, ends = (np.array(x, np.int64) for x in (self.shard, self.offsets, self.sizes, self.ends))
        return shard, offsets, sizes, Names(bytes(self.texts), ends)


def _state(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _members(shard: Path, inside: str, left_out: Counter[str]) -> tuple[dict[str, _Sample], tuple[int, int]]:
    """The samples of a shard that have an image, by their keys in the order of the shard, and the shard's state."""
    samples: dict[str, _Sample] = {}
    try:
        handle = os.open(shard, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"{inside}: cannot be read ({reason(error)})") from None
    try:
        state = _state(os.fstat(handle))
        for member in _Walk(handle, inside):
            _add(samples, member, handle, inside, left_out)
    except OSError as error:
        raise DataError(f"{inside}: cannot be read ({reason(error)})") from None
    finally:
        os.close(handle)
    without = [key for key, sample in samples.items() if not sample.image]
    for key in without:
        left_out["without an image"] += 1
        del samples[key]
    return samples, state


class _Member(NamedTuple):
    name: str
    offset: int
    size: int


def _add(samples: dict[str, _Sample], member: _Member, handle: int, inside: str, left_out: Counter[str]) -> None:
    folder, _, base = member.name.rpartition("/")
    stem, dot, rest = base.partition(".")
    suffix = (dot + rest).lower()
    if not stem or any(map(is_nobodys, member.name.split("/"))):
        left_out["hidden"] += 1
        return
    if suffix not in (*IMAGES, ".cls", ".json"):
        left_out["." + suffix.rpartition(".")[2] if suffix else "no suffix"] += 1
        return
    key = f"{folder}/{stem}" if folder else stem
    sample = samples.setdefault(key, _Sample())
    shown = printable(member.name)
    if suffix in IMAGES:
        if sample.image:
            raise DataError(f"{inside}: {printable(key)} has two images, {printable(sample.image)} and {shown}")
        sample.image, sample.offset, sample.size = member.name, member.offset, member.size
    elif suffix == ".cls":
        if sample.cls != NONE:
            raise DataError(f"{inside}: {shown} is in it twice")
        text = _piece(handle, member.offset, min(member.size, 32)).strip()
        if member.size > 32 or not re.fullmatch(rb"\d+", text):
            raise DataError(f"{inside}: {shown} holds no class as a number")
        sample.cls = _checked(int(text), shown, inside)
    else:
        if sample.json != NONE:
            raise DataError(f"{inside}: {shown} is in it twice")
        if member.size > LARGEST_JSON:
            raise DataError(f"{inside}: {shown} has {member.size} bytes, more than a label needs")
        sample.json = _of_json(_piece(handle, member.offset, member.size), shown, inside)


def _of_json(content: bytes, shown: str, inside: str) -> int:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{inside}: {shown} is no JSON ({reason(error)})") from None
    given = [found[name] for name in LABELS if found.get(name) is not None] if isinstance(found, dict) else []
    if not given:
        return NONE
    if type(given[0]) is not int:
        raise DataError(f"{inside}: {shown} holds a label that is no integer")
    return _checked(given[0], shown, inside)


def _checked(label: int, shown: str, inside: str) -> int:
    if not 0 <= label <= LARGEST_LABEL:
        raise DataError(f"{inside}: {shown} holds a label that is not in 0..{LARGEST_LABEL}")
    return label


class _Headers:
    """A file for `tarfile`, which reads a header as long as it claims to be, or the whole file if that is below 0."""

    def __init__(self, handle: int) -> None:
        self._handle, self._at = handle, 0

    def tell(self) -> int:
        return self._at

    def seek(self, position: int) -> None:
        self._at = position

    def read(self, size: int) -> bytes:
        if not 0 <= size <= LARGEST_HEADER or self._at < 0:
            raise tarfile.ReadError(f"a header of {size} bytes")
        content = _piece(self._handle, self._at, size)
        self._at += len(content)
        return content


class _Walk:
    """The members of a tar that are files. Raises DataError for whatever else is in it, but folders."""

    def __init__(self, handle: int, inside: str) -> None:
        self.handle, self.inside = handle, inside
        self.length = os.fstat(handle).st_size

    def __iter__(self) -> Iterator[_Member]:
        head = _piece(self.handle, 0, 2)
        if head == b"\x1f\x8b":
            raise DataError(f"{self.inside}: is compressed: gunzip it first, images are read by their place in it")
        headers: Any = _Headers(self.handle)
        at = 0
        try:
            archive: Any = tarfile.TarFile(fileobj=headers)
            while (info := archive.next()) is not None:
                archive.members.clear()  # an object for each would fill the memory
                self._check(info, at)
                if info.isreg():
                    name = info.name
                    while name.startswith("./"):
                        name = name[2:].lstrip("/")
                    yield _Member(name, info.offset_data, info.size)
                at = archive.offset
        except DataError:
            raise
        except OSError as error:
            raise DataError(f"{self.inside}: cannot be read ({reason(error)})") from None
        except Exception as error:  # tarfile raises many kinds; all mean that the tar is damaged
            raise DataError(f"{self.inside}: is cut off or damaged after byte {at} ({reason(error)})") from None
        self._check_end(archive.offset)

    def _check(self, info: tarfile.TarInfo, at: int) -> None:
        shown = printable(info.name)
        if info.name.startswith("/") or ".." in info.name.split("/") or "\\" in info.name:
            raise DataError(f"{self.inside}: {info.name!r} points out of the shard")
        if info.islnk() or info.issym():
            raise DataError(f"{self.inside}: {shown} is a link")
        if info.issparse() or not (info.isreg() or info.isdir()):
            raise DataError(f"{self.inside}: {shown} is no plain file")
        if info.size > LARGEST_MEMBER:
            raise DataError(f"{self.inside}: {shown} has {info.size >> 20} MiB, more than an image has")
        if info.size < 0 or info.offset_data <= at or info.offset_data + info.size > self.length:
            raise DataError(f"{self.inside}: {shown} is cut off")

    def _check_end(self, at: int) -> None:
        """`tarfile` takes whatever is no header for the end."""
        rest = _piece(self.handle, at, 2**20)
        if len(rest) < tarfile.BLOCKSIZE:
            raise DataError(f"{self.inside}: is cut off: it has no end")
        if any(rest[: tarfile.BLOCKSIZE]):
            raise DataError(f"{self.inside}: is damaged at byte {at}, or no tar")
        if any(rest):
            raise DataError(f"{self.inside}: goes on after its end at byte {at}")


def _piece(handle: int, offset: int, size: int) -> bytes:
    """So many bytes of a file, or those that it has. Raises OSError."""
    content = os.pread(handle, size, offset)
    while len(content) < size and (more := os.pread(handle, size - len(content), offset + len(content))):
        content += more
    return content
