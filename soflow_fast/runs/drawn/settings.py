"""What the images of a folder are made by, as its samples.json keeps it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...config.schema import SampleFormat, SamplingMethod, shown
from ...files import TEXT, read_file
from .. import source_code

MANIFEST = "samples.json"
KIND = "soflow-fast samples"
ARCHIVE = "sha256 of samples.npz"
WORDS = {
    "weights": "of other weights",
    "vae": "decoded by another VAE",
    "conditions": "of other conditions",
}
"""What is said of settings whose values tell a person nothing."""


@dataclass(frozen=True)
class Settings:
    """All that the bytes in a folder depend on, but for the kind of device and the versions that draw them."""

    n: int
    """Images."""
    seed: int
    times: tuple[float, ...]
    """Those of the network calls, falling from 1."""
    method: SamplingMethod
    labels: str
    """"balanced", also of a model without classes; "random"; or numbers with commas between."""
    batch_size: int
    format: SampleFormat
    latents: bool
    """Whether the samples are written as they are, float32 in .npy, in place of images."""
    flow: str
    """Objective, path and coefficients."""
    weights: str
    """SHA-256 of names and values of the network's weights."""
    vae: str
    """The same of the VAE that decodes, with scale and shift of the latents; "": none does."""
    guidance: float | None = None
    """The scale that samples have chosen, of a network that takes one."""
    conditions: str | None = None
    """SHA-256 of the vectors in turn; None: there are none."""

    def to_json(self, run: str, archive: str = "") -> str:
        """The text of the manifest.

        run: the name of what the weights were loaded from. archive: the SHA-256 of samples.npz; "": it is not there.
        """
        values = {"kind": KIND, "settings": asdict(self), "made_by": {"run": run, **source_code.versions()}}
        return json.dumps(values | ({ARCHIVE: archive} if archive else {}), indent=1) + "\n"

    def differences(self, old: dict[str, Any]) -> list[str]:
        """In what these settings differ from those that `read_settings` has found, for a person."""
        now = json.loads(json.dumps(asdict(self)))
        return [
            WORDS.get(name) or f"{name} {shown(old.get(name))}, not {shown(value)}"
            for name, value in now.items()
            if old.get(name) != value
        ]


def read_settings(folder: Path) -> dict[str, Any] | None:
    """The settings in a folder's manifest, not checked; None: there is no manifest.

    Raises OSError, and ValueError for what is none.
    """
    values = _read(folder)
    return values and values["settings"]


def read_archive(folder: Path) -> str:
    """The SHA-256 of samples.npz in a folder's manifest; "": it has none. Raises as `read_settings` does."""
    digest = (_read(folder) or {}).get(ARCHIVE)
    return digest if isinstance(digest, str) else ""


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(read_file(folder / MANIFEST, TEXT))
    except FileNotFoundError:
        return None
    except RecursionError:
        raise ValueError(f"{MANIFEST} is no manifest of samples") from None
    except ValueError:
        raise ValueError(f"{MANIFEST} is damaged") from None
    if not isinstance(values, dict) or values.get("kind") != KIND or not isinstance(values.get("settings"), dict):
        raise ValueError(f"{MANIFEST} is no manifest of samples")
    return values
