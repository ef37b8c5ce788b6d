"""Where a flow's weights come from, as far as that is known: what is said of them where they are published."""

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...config.schema import Config, RunConfig, from_dict, to_dict
from ...config.validation import validate
from ...data import identity
from ...data.identity import Identity
from ...files import TEXT, read_file
from .. import source_code
from .folder import directory

EVALUATION = "evaluation.json"


@dataclass(frozen=True)
class Origin:
    """The training that weights are of."""

    config: Config
    data: Identity | None = None
    step: int | None = None
    """Updates that they have seen."""
    code: dict[str, Any] = field(default_factory=dict)
    """As `source_code.versions` says it."""
    figures: dict[str, Any] = field(default_factory=dict)
    """As `runs.samples.evaluate` keeps them: samples, what they were compared with, and figures by name for each number
    of network calls."""


def of_checkpoint(folder: Path, config: Config, data: Identity | None, step: int | None) -> Origin:
    """The origin of the averaged weights in a checkpoint, of which these were read, with what lies in its run."""
    place = folder.absolute().parent
    run_dir = place.parent
    if directory(run_dir) != place or step is None:
        return Origin(config, data, step)
    return Origin(config, data, step, source_code.read(run_dir), _figures(run_dir, step))


def _figures(run_dir: Path, step: int) -> dict[str, Any]:
    try:
        values = json.loads(read_file(run_dir / EVALUATION, TEXT))
        return values if values.pop("step") == step else {}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):  # it is made anew by a start
        return {}


def published(origin: Origin) -> Origin:
    """An origin without what is of one machine alone: settings of the run, and paths of its data."""
    data = replace(origin.config.data, path="", vae="", conditions="", skip_bad=False)
    figures = dict(origin.figures)
    if isinstance(reference := figures.get("reference"), dict) and isinstance(path := reference.get("path"), str):
        figures["reference"] = {**reference, "path": os.path.basename(path.rstrip("/"))}
    return replace(origin, config=replace(origin.config, data=data, run=RunConfig(), micro_batch=0), figures=figures)


def to_values(origin: Origin) -> dict[str, Any]:
    """As JSON values: "data", the identity of the data or None, and "run", the rest."""
    data = None if origin.data is None else json.loads(identity.to_json(origin.data))
    run = {"config": to_dict(origin.config), "step": origin.step, "code": origin.code, "figures": origin.figures}
    return {"data": data, "run": run}


def from_values(values: dict[str, Any]) -> Origin | None:
    """The inverse of `to_values`; None: there is nothing known of a run. Raises ValueError."""
    run, data = values.get("run"), values.get("data")
    if run is None:
        return None
    if not isinstance(run, dict) or not all(isinstance(run.get(name), dict) for name in ("config", "code", "figures")):
        raise ValueError("run must be an object that holds config, code and figures")
    step = run.get("step")
    if step is not None and type(step) is not int:
        raise ValueError("run.step must be a whole number")
    known = None if data is None else identity.from_json(json.dumps(data))
    return Origin(validate(from_dict(run["config"])), known, step, run["code"], run["figures"])


def without_folders(origin: Origin | None) -> Origin | None:
    """An origin that names no VAE by a folder of this machine."""
    data = None if origin is None else origin.data
    if origin is None or data is None or data.space is None or not os.path.exists(data.space.vae):
        return origin
    return replace(origin, data=replace(data, space=data.space._replace(vae="")))
