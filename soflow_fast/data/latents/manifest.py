"""The manifest of a folder of latents, `latents.json`.

    {"kind": "soflow-fast latents", "format": 1, "count": 1281167, "channels": 4, ..., "shards": [
        {"count": 10010, "files": {"shard": {"sha256": ..., "bytes": ...}, "labels": {...}, "mirrored": {...}}}, ...]}

Shard k is shard-0000k.npy, float16 [n, 2C, H, W] of mean || std ([n, C, H, W] where the format has no std),
labels-0000k.npy, int64 [n], and for a flipped twin mirrored-0000k.npy, of the mirrored images. All but the last one
have the same n. Vectors in the place of labels are conditions.npy, float16 or float32 [count, E], and "conditions" is
their checksum. Each is a .npy file, so that anything can map it.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from ...files import read_file
from .layout import Layout, in_line

MANIFEST = "latents.json"
KIND = "soflow-fast latents"
FORMAT = 1
LARGEST = 2**26
"""Bytes that a manifest may have: the names of classes are the most of it."""


class File(NamedTuple):
    sha256: str
    bytes: int


class Shard(NamedTuple):
    """Files that were written together."""

    count: int
    files: dict[str, File]
    """By the first part of their names: "shard", "labels", "mirrored"."""


@dataclass(frozen=True)
class Header:
    """What is known of a folder of latents before the first of them."""

    layout: Layout
    count: int
    rows: int
    """Latents of each shard but the last one."""
    flipped: bool = False
    """Whether there is a twin of each, of the mirrored image."""
    classes: tuple[str, ...] = ()
    image_size: int = 0
    """Height and width of the images; 0: not known."""
    source: str = ""
    """Checksum of what was encoded."""
    weights: str = ""
    """SHA-256 of the VAE's weights, "" if it was not at hand."""
    conditions: str = ""
    """`Conditions.checksum` of vectors that came with the samples; "": none did."""

    def kinds(self) -> tuple[str, ...]:
        """The first parts of the names of a shard's files."""
        return ("shard", "labels", "mirrored") if self.flipped else ("shard", "labels")


def file_name(kind: str, number: int) -> str:
    """shard-00000.npy."""
    return f"{kind}-{number:05d}.npy"


def to_text(header: Header, shards: list[Shard]) -> str:
    """The manifest's text."""
    values = {"kind": KIND, "format": FORMAT, **asdict(header)}
    values |= values.pop("layout")
    listed = [{"count": s.count, "files": {k: f._asdict() for k, f in s.files.items()}} for s in shards]
    return json.dumps(values | {"shards": listed}, indent=1) + "\n"


def read_manifest(folder: Path) -> tuple[Header, list[Shard]]:
    """The manifest of a folder, checked in itself. Raises OSError, and ValueError that says what is wrong."""
    try:
        values = json.loads(read_file(folder / MANIFEST, LARGEST, follow=True))
        if values["kind"] != KIND:
            raise ValueError(f"is no manifest of {KIND}")
        if _whole("format", values["format"], 1) > FORMAT:
            raise ValueError(f"is of format {values['format']}; this version reads up to {FORMAT}, use a later one")
        layout = Layout(**{f.name: _value(f.name, values[f.name]) for f in fields(Layout)})
        values = {"conditions": "", **values}  # of a version that knew none
        rest = {f.name: _value(f.name, values[f.name]) for f in fields(Header) if f.name != "layout"}
        header = Header(layout, **rest)
        shards = [_shard(header, entry) for entry in values["shards"]]
    except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"is damaged ({in_line(error)})") from None
    wrong = layout.problem()
    if wrong or header.rows < 1 or header.count < 1 or len(shards) > -(-header.count // header.rows):
        raise ValueError(wrong or f"is damaged: {len(shards)} shards of {header.rows} for {header.count} latents")
    for number, shard in enumerate(shards):
        if shard.count != min(header.rows, header.count - number * header.rows):
            raise ValueError(f"is damaged: shard {number} is of {shard.count} latents")
    return header, shards


def _value(name: str, value: Any) -> Any:
    """A field of the manifest in its type. Raises ValueError."""
    known = {f.name: f.type for kind in (Layout, Header) for f in fields(kind)}[name]
    if name in ("scale", "shift"):
        if type(value) is list and all(type(number) in (int, float) for number in value):
            return tuple(map(float, value))
        right = isinstance(value, int | float) and type(value) is not bool
        value = float(value) if isinstance(value, int | float) else value
    elif name == "classes":
        right = type(value) is list and all(type(text) is str for text in value)
        value = tuple(value) if right else value
    else:
        right = type(value) is known
        value = _whole(name, value) if known is int else value
    if not right:
        raise ValueError(f"is damaged: {name} is {str(value)[:40]!r}")
    return value


def _whole(name: str, value: Any, least: int = 0) -> int:
    """A whole number of the manifest. Raises ValueError."""
    if type(value) is not int or not least <= value < 2**48:
        raise ValueError(f"is damaged: {name} is {str(value)[:40]!r}")
    return value


def _shard(header: Header, entry: dict[str, Any]) -> Shard:
    each = {kind: entry["files"][kind] for kind in header.kinds()}
    files = {kind: File(str(file["sha256"]), _whole("bytes", file["bytes"])) for kind, file in each.items()}
    return Shard(_whole("count", entry["count"]), files)


def checksum(header: Header, shards: list[Shard]) -> str:
    """SHA-256 of counts, shapes, scale and the hashes of all shards; where they lie is no part of it."""
    layout = {name: value for name, value in asdict(header.layout).items() if name != "vae"}
    hashes = [[shard.count, {kind: file.sha256 for kind, file in shard.files.items()}] for shard in shards]
    text = json.dumps([layout, header.count, header.flipped, header.classes, hashes], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
