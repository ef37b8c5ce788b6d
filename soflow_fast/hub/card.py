"""The model card: what weights are, how to use them, and how they came to be, as far as that is known."""

import json
import os
import shlex
from collections.abc import Iterator
from typing import Any

from ..config.presets import PRESETS, preset
from ..config.schema import SHORT_NAMES, TYPES, Config, UNetConfig, flatten
from ..data.identity import SHOWN, Identity
from ..errors import printable
from ..flow import SolutionFlow
from ..runs.checkpoint.origin import Origin
from ..sampling.solving import usual_calls

PAPER = "[SoFlow](https://arxiv.org/abs/2512.15657)"
MEANFLOW = "[MeanFlow](https://arxiv.org/abs/2505.13447)"
FREE = ("run.", "preset", "data.path", "data.vae", "data.conditions", "data.skip_bad", "micro_batch")
"""Fields that belong to one machine, or to the command's own arguments."""
FEW = 50_000
"""Samples below which figures are said to be of few."""
BESIDE = {"reference", "few", "guidance"}
"""What may stand beside the figures of samples: what they were compared with, whether they are few, and w."""


def model_card(flow: SolutionFlow, origin: Origin | None, name: str, use: str = "") -> str:
    """The text of README.md. name: of the repository or folder. use: Python that loads and draws; "": for a flow."""
    parts = [_header(flow), f"# {_text(name)}", _what(flow, origin), f"```python\n{use or _use(flow, name)}\n```"]
    if origin is None:
        parts.append("How these weights came to be is not recorded with them.")
    else:
        parts += [*_data(origin.data), *_training(origin), *_figures(origin.figures)]
    return "\n\n".join(parts) + "\n"


def command(config: Config) -> str:
    """A command line that trains the same: the preset, and what differs from it, without settings of one machine."""
    name = config.preset if config.preset in PRESETS else "digits"
    base, parts = preset(name), ["python", "-m", "soflow_fast.train", name]
    if config.data.kind in ("images", "latents"):
        parts += ["--data", "DATA"]
    if config.model.condition_size:
        parts += ["--conditions", "CONDITIONS"]
    flags = {field: f"--{short.replace('_', '-')}" for short, field in SHORT_NAMES.items() if TYPES[field] is not bool}
    before, after = flatten(base), flatten(config)
    for field in after:
        if before.get(field) != after[field] and not field.startswith(FREE):
            value = ",".join(map(str, after[field])) if isinstance(after[field], tuple) else str(after[field])
            parts += [flags[field], value] if field in flags else ["--set", f"{field}={value}"]
    return shlex.join(parts)


def _header(flow: SolutionFlow) -> str:
    found = {"soflow": ("soflow", "one-step"), "meanflow": ("meanflow", "one-step")}.get(
        flow.objective, ("flow-matching",)
    )
    tags = "".join(f"- {tag}\n" for tag in (*found, "image-generation", flow.network.config.kind))
    return f"---\nlibrary_name: soflow-fast\npipeline_tag: unconditional-image-generation\ntags:\n{tags}---"


def _what(flow: SolutionFlow, origin: Origin | None) -> str:
    model = flow.network.config
    parameters = sum(p.numel() for p in flow.parameters()) / 1e6
    of_latents = origin is not None and origin.config.data.latent
    kind = f"{'latents' if of_latents else 'samples'} of {model.in_channels} x {model.input_size} x {model.input_size}"
    if isinstance(model, UNetConfig):
        form = f"{flow.path} path, {flow.coefficients} coefficients"
        return f"{_kind(flow)}: a {model.words}, {parameters:.2f} M parameters, for {kind}, no classes, {form}."
    options = ", normalised queries and keys" if model.qk_norm else ""
    if model.guidance_range is not None:
        options += ", guidance from {:g} to {:g} chosen by samples".format(*model.guidance_range)
    classes = f"{model.num_classes} classes" if model.num_classes else "no classes"
    if model.condition_size:
        classes = f"vectors of {model.condition_size} numbers as conditions"
    return (
        f"{_kind(flow)}: a DiT of {parameters:.2f} M parameters (depth {model.depth}, hidden "
        f"size {model.hidden_size}, patches of {model.patch_size}{options}) for {kind}, {classes}, {flow.path} path, "
        f"{flow.coefficients} coefficients."
    )


def _kind(flow: SolutionFlow) -> str:
    match flow.objective:
        case "flow-matching":
            return "An image generator by flow matching, which takes several network calls"
        case "meanflow":
            return f"A one-step image generator by {MEANFLOW}"
    return f"A one-step image generator by {PAPER}"


def _use(flow: SolutionFlow, name: str) -> str:
    model = flow.network.config
    shape = f"None, shape=(2, {model.in_channels}, {model.input_size}, {model.input_size})"
    labels, calls = "[0, 1]" if model.num_classes > 1 else shape, usual_calls(flow)
    needed = given = ""
    if model.condition_size:
        labels, needed = "vectors", "import torch\n\n"
        given = f"vectors = torch.zeros(2, {model.condition_size})  # the embeddings of two texts, say\n"
    return (
        f"{needed}from soflow_fast import SolutionFlow, sample\n\n"
        f"flow = SolutionFlow.from_pretrained({json.dumps(name)})\n{given}"
        f"x = sample(flow, {labels}, nfe={calls}, seed=0)  # in the scale of the training data, images in [-1, 1]"
    )


def _data(data: Identity | None) -> Iterator[str]:
    if data is None:
        return
    count = f"{data.count} samples of " if data.count else ""  # of the authors' files it is not known
    lines = [f"- {_text(data.kind)}: {count}{' x '.join(map(str, data.shape))}"]
    if data.classes:
        more = f" and {len(data.classes) - SHOWN} more" if len(data.classes) > SHOWN else ""
        lines.append(f"- {len(data.classes)} classes: {', '.join(map(_text, data.classes[:SHOWN]))}{more}")
    if data.space is not None:
        vae, scale, shift = data.space
        of = f" of the VAE {_text(vae)}" if vae else ""
        lines.append(f"- latents z{of}, as x = (z - shift) scale, shift {shift}, scale {scale}")
    yield "## Data"
    known = [f"- identity {_text(data.checksum)}"] if data.checksum else []
    yield "\n".join([*lines, *known])


def _training(origin: Origin) -> Iterator[str]:
    config = origin.config
    steps = f"{config.steps}" if origin.step in (None, config.steps) else f"{origin.step} of {config.steps}"
    rows = [("steps", steps), ("images per step", config.batch_size), ("precision", config.precision)]
    trained = config.model.guidance_range
    guidance = f"{trained[0]:g} to {trained[1]:g}, chosen by samples" if trained else config.objective.guidance_scale
    rows += [("guidance", guidance), ("decay of the average", config.optim.ema_decay)]
    rows += [(name, value) for name, value in origin.code.items() if value]
    yield "## Training"
    yield _table(["", ""], rows)
    yield f"A command that trains the same:\n\n```\n{command(config)}\n```"


def _figures(figures: dict[str, Any]) -> Iterator[str]:
    """The figures of `runs.samples.evaluate`; of another form, as JSON."""
    if not figures:
        return
    yield "## Figures"
    match figures:
        case {"samples": int(samples), "nfe": dict(calls), **others} if _are_rows(calls) and others.keys() <= BESIDE:
            few = f", fewer than the {FEW} that are usual" if samples < FEW else ""
            scale = f" at guidance {_number(others['guidance'])}" if "guidance" in others else ""
            yield f"Of {samples} samples{scale}{few}, of the average of the weights{_against(others.get('reference'))}:"
            names = list(dict.fromkeys(name for row in calls.values() for name in row))
            rows = [[number, *(_number(row.get(name)) for name in names)] for number, row in calls.items()]
            yield _table(["network calls", *(name.replace("_", " ") for name in names)], rows)
        case _:
            yield f"```json\n{json.dumps(figures, indent=2)}\n```"


def _against(reference: Any) -> str:
    match reference:
        case {"path": str(path), "images": int(images), "statistics": bool(statistics)}:
            what = [f"{images} images"] * bool(images) + ["statistics"] * statistics
            return f", compared with {_text(os.path.basename(path.rstrip('/')))} ({' and '.join(what)})"
        case {"path": "digits", "images": int(images)}:
            return f", compared with {images} real digits"
        case _:
            return ""


def _are_rows(calls: dict[str, Any]) -> bool:
    return bool(calls) and all(isinstance(row, dict) for row in calls.values())


def _table(head: list[str], rows: list[Any]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_text(str(cell)) for cell in line)} |" for line in lines)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _text(text: str) -> str:
    """A text from a data set or a file, so that it stays on its line and within its cell."""
    return printable(text).replace("|", "\\|").replace("<", "&lt;")
