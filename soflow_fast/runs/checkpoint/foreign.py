"""The authors' files where a run or checkpoint is asked for: which file it is, and what it is of."""

import re
from dataclasses import replace
from pathlib import Path

from ...config.authors import SCALE, VAE
from ...config.presets import cifar10_unet
from ...config.schema import DIT_SIZES, Config, DataConfig, ObjectiveConfig, UNetConfig
from ...data.dataset import LatentSpace
from ...data.identity import Identity
from ...flow import SolutionFlow
from ...models.official import CHECKPOINTS, config_of, load_official


def official_file(source: Path) -> Path | None:
    """The authors' file at a path: the file itself, or the latest of their working directory; None: it is neither."""
    if source.is_file():
        return source
    if not (source / "config.yaml").is_file() or not (source / CHECKPOINTS).is_dir():
        return None
    found = [
        (int(file.stem), file) for file in (source / CHECKPOINTS).glob("*.pt") if re.fullmatch("[0-9]+", file.stem)
    ]
    return max(found)[1] if found else None


def load_official_run(file: Path) -> tuple[SolutionFlow, Config, Identity]:
    """The averaged weights in a file, with the configuration and data of its training as far as they are known.

    Raises CheckpointError as `load_official` does.
    """
    flow = load_official(file)
    model, known = flow.network.config, config_of(file)
    if known is None and isinstance(model, UNetConfig):
        known, space = cifar10_unet(), None
    elif known is None:
        kind = "images" if model.in_channels in (1, 3) else "latents"
        known = Config(preset=_preset(model.depth, model.hidden_size, model.patch_size), data=DataConfig(kind=kind))
        if not model.null_label:
            known = replace(known, objective=ObjectiveConfig(guidance_scale=1, label_drop=0))
        space = None
    else:
        space = LatentSpace(VAE, SCALE, 0.0) if known.data.latent else None
    config = replace(known, model=model)
    shape = (model.in_channels, model.input_size, model.input_size)
    return flow, config, Identity("the authors' data", 0, shape, (), (), "", space)


def _preset(*shape: int) -> str:
    """The preset of a size."""
    sizes = [name for name, (d, h, _, p) in DIT_SIZES.items() if (d, h, p) == shape and name != "S/2"]
    return f"imagenet256-{sizes[0].lower().replace('/', '')}" if sizes else "cifar10"
