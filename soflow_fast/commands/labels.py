"""The labels of images that are drawn, from the text of a flag: balanced, random, or a list of classes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..config.schema import nearest, shown
from ..errors import ConfigError
from .parser import whole_number

if TYPE_CHECKING:
    from torch import Tensor

NULL = "null"
"""The label of no class."""
BALANCED, RANDOM = "balanced", "random"
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
