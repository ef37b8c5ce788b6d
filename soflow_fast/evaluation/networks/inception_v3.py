"""The Inception network of FID, sFID, the Inception Score, precision, recall and KID, by torch-fidelity."""

import hashlib
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ...sampling.devices import copied
from .extractor import Extract, Extracted

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
"""TensorFlow's network of 2015 in torch's layout."""
SHA256 = "6726825d"
"""What the SHA-256 of the file begins with."""
SPATIAL = 7
"""Channels of the spatial features: 7 x 17 x 17 numbers, about as many as features."""


class Inception:
    """TensorFlow's Inception v3 of 2015-12-05, as torch-fidelity has it, in float32.

    Images are scaled to 299 x 299 as TensorFlow 1 does. Features are the pooled 2048 of the last block. Spatial
    features are those that ADM's evaluator takes (arXiv 2105.05233, after arXiv 2103.03841): its tensor `mixed_6/conv`
    is the first branch of what is `Mixed_6d` here, of which it takes 7 channels, in the order of height, width and
    channel. Logits are without bias, as in its evaluator.

    Args:
        file: the weights; "": downloaded once, to torch's hub folder.

    Raises ConfigError, in one line, where torch-fidelity, a fitting torchvision or the weights are missing.
    """

    name = "inception"

    def __init__(self, file: str = "") -> None:
        kind = _network_class()
        path = Path(file) if file else _downloaded()
        _check(path, f"--inception {file}" if file else str(path))
        try:
            self._network: Any = kind("inception-v3-compat", ["2048", "logits_unbiased"], str(path))
        except RuntimeError as error:
            text = " ".join(str(error).split())
            raise ConfigError(f"--inception {path}: is not of this network ({text[:120]})") from None

    def on(self, device: torch.device) -> Extract:
        """See Extractor."""
        network = copied(self._network, device)

        def extract(images: Tensor) -> Extracted:
            kept: list[Tensor] = []
            handle = network.Mixed_6d.branch1x1.register_forward_hook(lambda module, given, out: kept.append(out))
            try:
                features, logits = network(images)
            finally:
                handle.remove()
            spatial = kept[0][:, :SPATIAL].permute(0, 2, 3, 1).flatten(1)
            return Extracted(features, spatial, logits)

        return extract


def _network_class() -> Callable[..., Any]:
    """torch-fidelity's class of the network. Raises ConfigError."""
    install = "pip install 'torch-fidelity>=0.4'"
    try:
        importlib.import_module("torchvision")
    except ImportError as error:
        if getattr(error, "name", "") == "torchvision":
            raise ConfigError(f"torchvision is missing, which torch-fidelity needs: {_fitting()}") from None
        raise ConfigError(f"torchvision does not fit torch {torch.__version__}: {_fitting()}") from None
    except (RuntimeError, OSError, AttributeError):  # of another torch: its operators or libraries cannot be loaded
        raise ConfigError(f"torchvision does not fit torch {torch.__version__}: {_fitting()}") from None
    try:
        return importlib.import_module("torch_fidelity").FeatureExtractorInceptionV3
    except ImportError:
        raise ConfigError(f"torch-fidelity is missing, whose network FID is measured by: {install}") from None


def _fitting() -> str:
    """The command that installs what fits the torch at hand: torchvision 0.(15 + n) belongs to torch 2.n."""
    known = re.match(r"2\.(\d+)", torch.__version__)
    wanted = f"'torchvision==0.{int(known[1]) + 15}.*'" if known else "torchvision"
    build = re.search(r"\+(cpu|cu\d+|rocm[\d.]+)$", torch.__version__)
    index = f" --index-url https://download.pytorch.org/whl/{build[1]}" if build else ""
    return f"pip install {wanted}{index}"


def _downloaded() -> Path:
    """The weights in torch's hub folder, fetched if they are not there. Raises ConfigError."""
    path = Path(torch.hub.get_dir(), "checkpoints", URL.rpartition("/")[2])
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, str(path), hash_prefix=SHA256, progress=False)
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"--inception FILE is needed: {URL} cannot be fetched ({reason[:100]})") from None
    elif not hashlib.sha256(path.read_bytes()).hexdigest().startswith(SHA256):
        raise ConfigError(f"{path}: is damaged, its SHA-256 does not begin with {SHA256}; remove it")
    return path


def _check(path: Path, name: str) -> None:
    """Raise ConfigError if a file cannot be read, or holds anything but tensors: torch-fidelity would run it."""
    try:
        torch.load(path, map_location="meta", weights_only=True)
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # of a damaged zip or pickle torch raises many kinds
        text = " ".join(str(error).split()).partition("(1)")[0]
        raise ConfigError(f"{name}: holds no weights ({type(error).__name__}: {text[:100]})") from None
