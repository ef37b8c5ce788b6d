"""Which data a run learns from: kept with it and with each checkpoint, and compared when it goes on.

The path is no part of it."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .dataset import Dataset, LatentSpace, Normalisation

SHOWN = 12
"""Classes that are shown by name."""
MOST_BYTES = 2**24
"""Of an identity as text."""


@dataclass(frozen=True)
class Identity:
    """What makes a data set the same one elsewhere."""

    kind: str
    count: int
    shape: tuple[int, int, int]
    """Channels, height and width of a sample."""
    classes: tuple[str, ...]
    """Their names by number."""
    counts: tuple[int, ...]
    """Samples of each."""
    checksum: str
    space: LatentSpace | None = None
    """Of latents."""
    source: str = ""
    """The checksum of what latents were converted from, which are the same data; "": it is not known."""
    conditions: str = ""
    """The checksum of vectors in the place of labels; "": there are none."""
    normalisation: Normalisation | None = None
    """Of demonstrations; it is no part of whether they are the same, which the checksum says."""


def identify(dataset: Dataset) -> Identity:
    """The identity of a data set."""
    contents, classes = dataset.contents, dataset.contents.classes
    counts = torch.bincount(dataset.labels, minlength=len(classes)).tolist() if classes else []
    samples = (contents.kind, len(dataset), dataset.shape, classes, tuple(counts))
    vectors = "" if dataset.conditions is None else dataset.conditions.checksum
    known = (contents.checksum, contents.space, contents.source, vectors)
    return Identity(*samples, *known, contents.normalisation)


def to_json(identity: Identity) -> str:
    """As JSON text."""
    values = asdict(identity) | {"space": identity.space and identity.space._asdict()}
    del values["normalisation"]  # which older versions do not know
    if identity.normalisation is not None:
        values["normalisation"] = identity.normalisation._asdict()
    return json.dumps(values, indent=None if len(identity.classes) > SHOWN else 2) + "\n"


def from_json(text: str | bytes) -> Identity:
    """The inverse of `to_json`. Raises ValueError."""
    try:
        values: Any = json.loads(text)
        shape = tuple(map(int, values["shape"]))
        if len(shape) != 3 or not all(isinstance(values[name], str) for name in ("kind", "checksum")):
            raise ValueError("not of this form")
        return Identity(
            values["kind"],
            int(values["count"]),
            shape,
            tuple(map(str, values["classes"])),
            tuple(map(int, values["counts"])),
            values["checksum"],
            None if values.get("space") is None else _space(values["space"]),
            str(values.get("source", "")),
            str(values.get("conditions", "")),
            None if values.get("normalisation") is None else _normalisation(values["normalisation"]),
        )
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"no identity of a data set: {type(error).__name__}: {error}") from None


def _space(values: Any) -> LatentSpace:
    scale, shift = (values[name] for name in ("scale", "shift"))
    each = [tuple(map(float, value)) if isinstance(value, list) else float(value) for value in (scale, shift)]
    return LatentSpace(str(values["vae"]), *each)


def _normalisation(values: Any) -> Normalisation:
    return Normalisation(*(tuple(map(float, values[name])) for name in Normalisation._fields))


def changes(old: Identity, new: Identity) -> list[str]:
    """What differs, in words; nothing, if both are the same data."""
    found = []
    if old.count != new.count:
        found.append(f"{old.count} samples -> {new.count}")
    if old.shape != new.shape:
        found.append(f"shape {_shape(old)} -> {_shape(new)}")
    if old.classes != new.classes:
        gone, come = (sorted(set(a) - set(b)) for a, b in ((old.classes, new.classes), (new.classes, old.classes)))
        parts = [f"without {_some(gone)}"] * bool(gone) + [f"with {_some(come)}"] * bool(come)
        found.append(f"{len(old.classes)} classes -> {len(new.classes)}: {', '.join(parts) or 'in another order'}")
    elif old.counts != new.counts:
        each = zip(old.classes, old.counts, new.counts, strict=True)
        found.append("samples of " + _some([f"{name}: {a} -> {b}" for name, a, b in each if a != b]))
    if (old.space and old.space[1:]) != (new.space and new.space[1:]):  # where the VAE lies is no part of it
        found.append("another scale or shift of latents")
    if old.conditions != new.conditions:
        found.append(("other" if new.conditions else "no") + " vectors" if old.conditions else "vectors for labels")
    if not found and not _same_samples(old, new):
        if new.normalisation is not None:
            found.append("other demonstrations; a task's are those of its --seed")
        else:
            found.append("other latents or labels" if new.space else "other names, sizes or labels of samples")
    return found


def _same_samples(old: Identity, new: Identity) -> bool:
    """Whether the checksums agree, or one is of latents that the other was converted from."""
    converted = {(old.checksum, new.source), (new.checksum, old.source)}
    return old.checksum == new.checksum or any(a == b != "" for a, b in converted)


def describe(dataset: Dataset, identity: Identity, place: str, listed: str = "") -> list[str]:
    """The block that is printed before a training: what there is, what was left out and why, and the identity.

    listed: the file that names every bad sample, if there is one.
    """
    where = f" at {place}" if place else ""
    lines = [f"data: {identity.kind}{where}, {identity.count} samples of {_shape(identity)}"]
    if identity.classes:
        lines.append(f"  {len(identity.classes)} classes: {_classes(identity)}")
    else:
        lines.append("  no classes")
    left_out = dataset.contents.left_out
    if left_out:
        reasons = [f"{count} {reason}" for reason, count in left_out.most_common()]
        lines.append(f"  left out: {_some(reasons)}")
    lines += [f"  {note}" for note in dataset.contents.notes]
    if listed and dataset.contents.bad():
        lines.append(f"  all that are bad: {listed}")
    return [*lines, f"  identity: {identity.checksum[:16]}"]


def _classes(identity: Identity) -> str:
    each = [f"{name} {count}" for name, count in zip(identity.classes, identity.counts, strict=True)]
    if len(each) <= SHOWN:
        return ", ".join(each)
    least, most = min(identity.counts), max(identity.counts)
    return f"{', '.join(each[:SHOWN])} and {len(each) - SHOWN} more, of {least} to {most}"


def _shape(identity: Identity) -> str:
    return " x ".join(map(str, identity.shape))


def _some(parts: Iterable[str]) -> str:
    found = list(parts)
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return ", ".join(found[:SHOWN]) + more
