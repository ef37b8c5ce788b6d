"""The networks that features are taken of."""

from collections.abc import Iterable

from ...errors import ConfigError
from .extractor import Extract, Extracted, Extractor, RandomFeatures

__all__ = ["NETWORKS", "Extract", "Extracted", "Extractor", "RandomFeatures", "open_networks"]

NETWORKS = ("inception", "dinov2", "random")
"""Their names."""


def open_networks(names: Iterable[str], *, inception: str = "", dinov2: str = "") -> dict[str, Extractor]:
    """Networks by name. inception: the file of its weights, "": torch-fidelity's, downloaded once. dinov2: its file or
    folder. Raises ConfigError."""
    found: dict[str, Extractor] = {}
    for name in names:
        if name == "inception":
            from .inception_v3 import Inception

            found[name] = Inception(inception)
        elif name == "dinov2":
            from .vit import Dinov2

            if not dinov2:
                raise ConfigError("--dinov2 FILE is needed: weights of DINOv2 are never downloaded")
            found[name] = Dinov2(dinov2)
        else:
            assert name == RandomFeatures.name
            found[name] = RandomFeatures()
    return found
