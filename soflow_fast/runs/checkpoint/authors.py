"""A run as the authors' trainer keeps one: OUT/config.yaml and OUT/ckpts/STEP.pt, for their train.py, inference.py."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...config.authors import to_authors
from ...config.schema import Config
from ...files import sync
from ...models.official import CHECKPOINTS
from ...models.official.shapes import TABLE
from ...training.state import build_flow
from . import Whole
from .folder import begin


def export_authors(whole: Whole, out: Path) -> Path:
    """Write weights, averages, moments and step to the new directory `out`, with the configuration. Returns the file.

    A null label that was never trained, as no label was dropped, is left out: their network has no row for it then.
    Raises ValueError naming what their code does not let be chosen, and OSError, leaving nothing behind.
    """
    text = to_authors(whole.config, os.path.abspath(out))
    content = as_authors(whole)
    temporary = begin(out)
    try:
        (temporary / CHECKPOINTS).mkdir()
        file = temporary / CHECKPOINTS / f"{whole.step}.pt"
        torch.save(content, file)
        (temporary / "config.yaml").write_text(text)
        for path in (file, temporary / "config.yaml", file.parent, temporary):
            sync(path)
        os.rename(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(out.parent)
    return out / CHECKPOINTS / file.name


def as_authors(whole: Whole) -> dict[str, Any]:
    """The content of their file. Their optimiser numbers all parameters of their network, positions first, which are
    one there, though not trained."""
    config = whole.config
    cut = config.model.null_label and config.objective.label_drop == 0 and config.model.num_classes > 0
    names = list(build_flow(config).state_dict())

    def rows(name: str, value: Tensor) -> Tensor:
        return value[:-1].clone() if cut and name == f"network.{TABLE}" and value.dim() else value

    network, ema = ({name: rows(name, weights[name]) for name in names} for weights in (whole.network, whole.ema))
    state = {
        names.index(name): {part: rows(name, value) for part, value in entry.items()}
        for name, entry in whole.moments.items()
    }
    images = whole.data.count if whole.data is not None else 0
    return {
        "model": network,
        "ema_model": ema,
        "optimizer": {"state": dict(sorted(state.items())), "param_groups": [_group(config, len(names))]},
        "finished_steps": whole.step,
        "finished_epochs": whole.step * config.batch_size // images if images else 0,
    }


def _group(config: Config, count: int) -> dict[str, Any]:
    """The settings of an AdamW of theirs, as the torch that is installed keeps them."""
    parameters = [torch.nn.Parameter(torch.empty(0)) for _ in range(count)]
    optim = config.optim
    adamw = torch.optim.AdamW(
        parameters, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
    )
    return adamw.state_dict()["param_groups"][0]
