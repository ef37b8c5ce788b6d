"""The configuration files of the authors' trainer (zlab-princeton/SoFlow), in YAML, read and written.

Their files are flat: a field a line, with a number, a text or a list of them. That much of YAML is read here, and a
number such as 1e-4 as a number, which YAML 1.1 takes for text.
"""

import contextlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple

from .presets import cifar10_unet, imagenet256
from .schema import (
    DIT_SIZES,
    Coefficients,
    Config,
    DataConfig,
    DiTConfig,
    FlowConfig,
    FlowPath,
    UNetConfig,
    flatten,
    nearest,
)
from .validation import validate

SIZES = {f"DiT-{name.replace('/', '-')}": name for name in ("B/4", "B/2", "M/2", "L/2", "XL/2")}
"""Their `model_type` by ours, but for the U-Net, of which there is one."""
UNET = "UNet"
PATHS: dict[str, FlowPath] = {"Linear": "linear", "Triangular": "trig", "Trig": "trig"}
"""Their `noising_type`: the trainer's hints say Trig, the model knows Triangular alone."""
COEFFICIENTS: dict[str, Coefficients] = {"Euler": "euler", "Triangular": "trig", "Trig": "trig"}
SCHEDULES = {"Const": "constant", "Linear": "linear", "Cosine": "cosine", "Exponent": "exponent"}


class Data(NamedTuple):
    """A data set of theirs: what its model takes."""

    channels: int
    classes: int
    latent: bool


DATA = {"Imagenet": Data(4, 1000, True), "CIFAR10": Data(3, 10, False)}
VAE, SCALE = "stabilityai/sd-vae-ft-mse", 0.18215
"""Of their latents of ImageNet."""

NUMBERS = {
    "velocity_loss_ratio": "objective.fm_fraction",
    "p": "objective.p",
    "eps": "objective.eps",
    "cfg_scale": "objective.guidance_scale",
    "mix_ratio": "objective.mix_ratio",
    "cfg_drop_rate": "objective.label_drop",
    "cfg_decay_time": "objective.guidance_decay_time",
    "l_init_ratio": "objective.r_init",
    "l_end_ratio": "objective.r_end",
    "total_steps": "steps",
    "ema_decay_rate": "optim.ema_decay",
    "learning_rate": "optim.lr",
    "weight_decay": "optim.weight_decay",
    "batch_size": "batch_size",
    "logging_steps": "run.log_every",
    "eval_demo_steps": "run.sample_every",
    "ckpt_saving_steps": "run.checkpoint_every",
    "seed": "seed",
}
"""Their fields and ours that hold the same number."""
TIMES = ("fm_time", "sc_end_time", "sc_time")
"""The fields of the objective in the order of their `time_mean` and `time_std`."""
OTHERS = {
    *("working_dir", "noising_type", "coefficient_type", "model_type", "dataset_type", "data_size", "dataset_path"),
    *("time_mean", "time_std", "l_schedule", "betas", "num_workers", "prefetch_factor", "eval_steps"),
    *("eval_batch_size", "eval_NFE", "eval_demo_shape"),
}
KNOWN = NUMBERS.keys() | OTHERS
DEFAULTS: dict[str, Any] = {
    "noising_type": "Linear",
    "coefficient_type": "Euler",
    "model_type": "DiT-B-4",
    "dataset_type": "Imagenet",
    "data_size": 32,
    "cfg_scale": 1.0,
    "mix_ratio": 1.0,
    "cfg_drop_rate": 0.0,
    "cfg_decay_time": 1.0,
    "ckpt_saving_steps": 200_000,
    "eval_demo_steps": 1000,
    "seed": 42,
}
"""What a field that is left out is in their trainer, where it is not so in our preset for their recipe."""


def is_theirs(text: str) -> bool:
    """Whether a file's fields are those of a configuration of their trainer."""
    return re.search(r"^(model_type|noising_type|coefficient_type)\s*:", text, re.MULTILINE) is not None


def read_yaml(text: str) -> dict[str, Any]:
    """The fields of a flat YAML file. Raises ValueError naming the line of anything else."""
    found: dict[str, Any] = {}
    field = ""
    for number, line in enumerate(text.splitlines(), 1):
        content = _without_comment(line).rstrip()
        if not content or content in ("---", "..."):
            continue
        item = re.fullmatch(r"\s*-\s+(.+)", content)
        if item and isinstance(found.get(field, ()), list):
            found[field].append(_scalar(item[1], number))
            continue
        pair = re.fullmatch(r"([A-Za-z_]\w*)\s*:(?:\s+(.*))?", content)
        if not pair:
            raise ValueError(f"line {number} is no field with a number, text or list: {content.strip()[:40]!r}")
        field, value = pair[1], (pair[2] or "").strip()
        if field in found:
            raise ValueError(f"line {number}: {field} is there twice")
        listed = re.fullmatch(r"\[(.*)\]|\((.*)\)", value)
        if listed:
            parts = (listed[1] if listed[1] is not None else listed[2]).split(",")
            found[field] = [_scalar(part.strip(), number) for part in parts if part.strip()]
        else:
            found[field] = _scalar(value, number) if value else []
    return found


def _without_comment(line: str) -> str:
    """A line up to a # that begins it or follows a space, outside of quotes."""
    quote = ""
    for k, c in enumerate(line):
        if quote:
            quote = "" if c == quote else quote
        elif c in "\"'":
            quote = c
        elif c == "#" and (k == 0 or line[k - 1].isspace()):
            return line[:k]
    return line


def _scalar(text: str, number: int) -> Any:
    if text[:1] in ("'", '"'):
        if len(text) < 2 or text[-1] != text[0]:
            raise ValueError(f"line {number}: a quotation mark is missing")
        return text[1:-1]
    if text[:1] in ("{", "[", "&", "*", "!", "|", ">", "%", "@", "`"):
        raise ValueError(f"line {number} is no field with a number, text or list: {text[:40]!r}")
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text.replace("_", ""))
    return {"true": True, "false": False, "null": None, "~": None}.get(text.lower(), text)


def from_authors(values: Mapping[str, Any]) -> Config:
    """Their configuration as ours. Raises ValueError naming a field that is unknown or wrong."""
    for name in values:
        if name not in KNOWN:
            raise ValueError(f"unknown field {name[:40]!r}{nearest(name, KNOWN)}")
    values = {**DEFAULTS, **values}
    data = _one_of("dataset_type", values, DATA)
    numbers = {ours: _number(theirs, values[theirs]) for theirs, ours in NUMBERS.items() if theirs in values}
    side = int(_number("data_size", values["data_size"]))
    flow = FlowConfig(_one_of("noising_type", values, PATHS), _one_of("coefficient_type", values, COEFFICIENTS))
    if values["model_type"] == UNET:
        if data.latent:
            raise ValueError("model_type UNet goes with dataset_type CIFAR10")
        base = cifar10_unet()
        config = replace(base, model=UNetConfig(input_size=side, in_channels=data.channels), flow=flow)
    else:
        size = _one_of("model_type", values, {**SIZES, UNET: UNET})
        model = DiTConfig.named(
            size,
            input_size=side,
            in_channels=data.channels,
            num_classes=data.classes,
            null_label=numbers["objective.label_drop"] > 0,
        )
        kind = "latents" if data.latent else "images"
        config = replace(imagenet256(size), model=model, flow=flow, data=DataConfig(kind=kind))
        if not data.latent:
            config = replace(config, preset="cifar10")
    if values.get("dataset_path"):
        config = replace(config, data=replace(config.data, path=str(values["dataset_path"])))
    objective: dict[str, Any] = {}
    if "l_schedule" in values:
        objective["r_schedule"] = _one_of("l_schedule", values, SCHEDULES)
    means, deviations = (_numbers(name, values, 3) for name in ("time_mean", "time_std"))
    for k, name in enumerate(TIMES):
        mean, deviation = getattr(config.objective, name)
        objective[name] = (means[k] if means else mean, deviations[k] if deviations else deviation)
    optim = {"betas": tuple(betas)} if (betas := _numbers("betas", values, 2)) else {}
    sections: dict[str, dict[str, Any]] = {"objective": objective, "optim": optim, "run": {}, "": {}}
    for name, value in numbers.items():
        section, _, last = name.rpartition(".")
        kind = type(flatten(config)[name])
        sections[section][last] = int(value) if kind is int and float(value).is_integer() else kind(value)
    inner = {name: replace(getattr(config, name), **sections[name]) for name in ("objective", "optim", "run")}
    return validate(replace(config, **inner, **sections[""]))


def _one_of(field: str, values: Mapping[str, Any], known: Mapping[str, Any]) -> Any:
    value = values[field]
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{field} must be one of {', '.join(known)}, got {str(value)[:40]!r}")
    return known[value]


def _number(field: str, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{field} must be a number, got {str(value)[:40]!r}")
    return value


def _numbers(field: str, values: Mapping[str, Any], count: int) -> list[float] | None:
    if field not in values:
        return None
    value = values[field]
    if not isinstance(value, list) or len(value) != count:
        raise ValueError(f"{field} must be a list of {count} numbers, got {str(value)[:40]!r}")
    return [float(_number(field, part)) for part in value]


def size_of(model: DiTConfig) -> str:
    """Their `model_type` of a network. Raises ValueError naming the field that their code does not let be chosen."""
    for theirs, ours in SIZES.items():
        depth, hidden_size, num_heads, patch_size = DIT_SIZES[ours]
        shape = {"depth": depth, "hidden_size": hidden_size, "num_heads": num_heads, "patch_size": patch_size}
        if all(getattr(model, name) == value for name, value in {**shape, "mlp_ratio": 4}.items()):
            return theirs
    shape = f"depth {model.depth}, hidden_size {model.hidden_size}, {model.num_heads} heads, patch {model.patch_size}"
    raise ValueError(f"model: their code builds {', '.join(SIZES)}, not {shape}, mlp_ratio {model.mlp_ratio:g}")


def to_authors(config: Config, working_dir: str) -> str:
    """Our configuration as their YAML file. Raises ValueError naming a field that their code does not let be chosen."""
    model = config.model
    if isinstance(model, UNetConfig):
        raise ValueError("model: a U-Net of theirs is read, but not written")
    if model.guidance_range is not None:
        raise ValueError("model.guidance_range: their network has no embedder of a guidance scale")
    if model.condition_size:
        raise ValueError("model.condition_size: their network takes labels")
    if config.objective.kind != "soflow":
        raise ValueError(f"objective.kind: their code trains and samples soflow, not {config.objective.kind}")
    kind = next((name for name, data in DATA.items() if data[:2] == (model.in_channels, model.num_classes)), None)
    if kind is None:
        known = " or ".join(
            f"{name} of {data.channels} channels, {data.classes} classes" for name, data in DATA.items()
        )
        has = f"{model.in_channels} channels, {model.num_classes} classes"
        raise ValueError(f"model: their code knows {known}, not {has}")
    if model.qk_norm:
        raise ValueError("model.qk_norm: their network has no norms of queries and keys")
    flat, spelt = flatten(config), _spelt
    if not model.null_label:
        flat["objective.label_drop"] = 0.0
    objective = config.objective
    values: dict[str, Any] = {
        "working_dir": working_dir,
        "noising_type": spelt(PATHS, config.flow.path),
        "coefficient_type": spelt(COEFFICIENTS, config.flow.coefficients),
        "model_type": size_of(model),
        "dataset_type": kind,
        "data_size": model.input_size,
        "dataset_path": config.data.path or "./imagenet_latent",
        "time_mean": [getattr(objective, name)[0] for name in TIMES],
        "time_std": [getattr(objective, name)[1] for name in TIMES],
        "l_schedule": spelt(SCHEDULES, objective.r_schedule),
        "betas": list(config.optim.betas),
        **{theirs: flat[ours] for theirs, ours in NUMBERS.items()},
    }
    # Every field of their inference, and decimals with a point: 1e-05 is text to their YAML.
    return "".join(f"{name}: {_written(value)}\n" for name, value in values.items())


def _spelt(known: Mapping[str, str], value: str) -> str:
    return next(theirs for theirs, ours in known.items() if ours == value)


def _written(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, float):
        text = repr(value)
        mantissa, e, exponent = text.partition("e")
        return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{exponent}" if e else text
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)


def unknown_to_authors(config: Config) -> list[str]:
    """The fields whose values their trainer has no place for, as "optim.grad_clip 1.0"."""
    usual = Config()
    names = [f"optim.{item.name}" for item in fields(usual.optim)] + ["objective.teacher", "data.flip"]
    free = {"optim.betas", *NUMBERS.values()}
    ours, default = flatten(config), flatten(usual)
    return [f"{name} {ours[name]}" for name in names if name not in free and ours[name] != default[name]]
