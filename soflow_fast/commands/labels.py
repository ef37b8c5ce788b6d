"""The labels of images that are drawn, from the text of a flag: balanced, random, or a list of classes; or their
vectors, from a file."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.schema import ModelConfig, nearest, shown
from ..errors import ConfigError
from .parser import whole_number

if TYPE_CHECKING:
    from torch import Tensor

NULL = "null"
"""The label of no class."""
BALANCED, RANDOM = "balanced", "random"
CONDITIONS = "vectors of a model that takes some, .npy or .npz, repeated in turn (default: images of no condition)"
"""Help on the flag --conditions of commands that draw."""
BLOCK = 1024
"""Random labels of one generator: label i is the same however many are drawn."""


def parsed_labels(text: str, num_classes: int, names: Sequence[str]) -> str | list[int]:
    """BALANCED, RANDOM or numbers of classes, which repeat in turn; the null label is `num_classes`.

    A class that is named as one of these words is meant by it. names: of the classes by number, or none. Raises
    ConfigError.
    """
    parts = text.split(",")
    if any(not part.strip() and part not in names for part in parts):
        raise ConfigError(f"--labels {shown(text)}: {'a class' if len(parts) > 1 else 'it'} is empty")
    if not num_classes:
        if text != BALANCED:
            raise ConfigError(f"--labels {text}: the model has no classes")
        return BALANCED
    if text in (BALANCED, RANDOM) and text not in names:
        return text
    return [_label(part, num_classes, names) for part in parts]


def labels_of(chosen: str | list[int], num_classes: int, n: int, seed: int) -> "Tensor | None":
    """The label of each image, int64 [n]; None: the model has no classes. seed: of those that are random."""
    import torch

    from ..rng import generator

    if not num_classes:
        return None
    if chosen == RANDOM:
        sources = (generator(seed, block, 0, "sample labels") for block in range(-(-n // BLOCK)))
        return torch.cat([torch.randint(num_classes, (BLOCK,), generator=source) for source in sources])[:n]
    turn = torch.arange(num_classes) if isinstance(chosen, str) else torch.tensor(chosen)
    return turn[torch.arange(n) % len(turn)]


def vectors_of(path: str | None, model: ModelConfig, run: str) -> "Tensor | None":
    """The vectors of a file, float32 [M, E], for a model that takes some; None: no file is given, or the model takes
    labels. run: what the model was loaded from. Raises ConfigError and DataError."""
    if path is None:
        if model.condition_size and not model.null_label:
            raise ConfigError(f"--conditions is missing: {run} was trained with a vector each, it has no null one")
        return None
    if not model.condition_size:
        raise ConfigError(f"--conditions {path}: {run} takes {'labels' if model.num_classes else 'no condition'}")
    import torch

    from ..data.conditions import first_not_finite, read_vectors

    vectors = read_vectors(Path(path))
    if vectors.size != model.condition_size:
        raise vectors.error(f"has vectors of {vectors.size} numbers, {run} takes {model.condition_size}")
    wrong = first_not_finite(vectors.values)
    if wrong is not None:
        raise vectors.error(f"the vector of row {wrong} is not finite")
    return torch.tensor(vectors.values).float()


def digest_of(vectors: "Tensor | None") -> str | None:
    """SHA-256 of vectors, float32 [M, E]; None stays None."""
    if vectors is None:
        return None
    return hashlib.sha256(f"{list(vectors.shape)}".encode() + vectors.numpy().tobytes()).hexdigest()


def _label(text: str, num_classes: int, names: Sequence[str]) -> int:
    """A class by its name, its number, or "null", which is never a name. A name that is a number counts as a name."""
    text = text if text in names else text.strip()
    if text == NULL:
        return num_classes
    if text in names:
        return names.index(text)
    if names and not text.lstrip("-").isdigit():
        raise ConfigError(f"--labels {text}: no class of this run{nearest(text, names)}")
    return whole_number("--labels", text, 0, num_classes - 1)
