"""The configuration of a run: frozen dataclasses, JSON in and out.

A configuration is plain data. Building one never fails on meaning; `validation.validate` says what is wrong, by field.
"""

import dataclasses
import difflib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, get_args, get_origin, get_type_hints

AUTO = -1
"""The micro-batch that is found at start-up."""

# name: depth, hidden_size, num_heads, patch_size (Peebles & Xie 2023, arXiv 2212.09748; M: arXiv 2512.15657)
DIT_SIZES = {
    "S/2": (12, 384, 6, 2),
    "B/4": (12, 768, 12, 4),
    "B/2": (12, 768, 12, 2),
    "M/2": (16, 1024, 16, 2),
    "L/2": (24, 1024, 16, 2),
    "XL/2": (28, 1152, 16, 2),
}


@dataclass(frozen=True)
class DiTConfig:
    """The shape of a Diffusion Transformer; the defaults are DiT-XL/2 on 32 x 32 x 4 latents."""

    input_size: int = 32
    """Height and width of the input, in pixels or latent cells."""
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    """Row `num_classes` of the label table is the null label, so the table has one row more."""

    @classmethod
    def named(cls, size: str, **others: Any) -> "DiTConfig":
        """A public size by name ("S/2", "B/4", "B/2", "M/2", "L/2", "XL/2"; a leading "DiT-" is allowed)."""
        key = size.removeprefix("DiT-")
        if key not in DIT_SIZES:
            raise ValueError(
                f"unknown DiT size {size!r}{nearest(key, DIT_SIZES)}; the sizes are {', '.join(DIT_SIZES)}"
            )
        depth, hidden_size, num_heads, patch_size = DIT_SIZES[key]
        return cls(depth=depth, hidden_size=hidden_size, num_heads=num_heads, patch_size=patch_size, **others)


@dataclass(frozen=True)
class FlowConfig:
    """The path from data to noise and the coefficients of the solution function."""

    path: str = "linear"
    coefficients: str = "euler"


@dataclass(frozen=True)
class ObjectiveConfig:
    """The SoFlow objective; the defaults are the public ImageNet recipe (arXiv 2512.15657)."""

    guidance_scale: float = 3.0
    """w of the guided velocity; 1 is no guidance."""
    guidance_decay_time: float = 0.8
    """t_d: guidance fades for t > t_d; 1 or more: never."""
    mix_ratio: float = 0.25
    """m: weight of the guided velocity in the target, the rest being the network's own."""
    p: float = 1.0
    """Power of the Huber-like weight; 0 is the plain squared error."""
    eps: float = 0.01
    r_schedule: str = "exponent"
    r_init: float = 0.1
    """r at the first step: how far the middle time l lies from t towards s."""
    r_end: float = 0.002
    fm_fraction: float = 0.75
    """lambda: fraction of the batch that takes the flow-matching loss."""
    label_drop: float = 0.1
    fm_time: tuple[float, float] = (-0.2, 1.0)
    """Mean and deviation of logit t, flow matching."""
    sc_time: tuple[float, float] = (0.2, 0.8)
    """Mean and deviation of logit t, consistency."""
    sc_end_time: tuple[float, float] = (-1.0, 0.8)
    """Mean and deviation of logit s, consistency."""
    teacher: str = "student"
    """Whose increment the consistency loss takes: "student", the published stop-gradient target; "ema", both ends from
    an average of the student's weights; "ema-literal", the end from that average and the start from the student, which
    does not train: the difference between the two networks is divided by t - l as well."""
    teacher_decay: float = 0.99
    """Decay of that average, apart from the one that is sampled; at first it is (1 + step) / (10 + step)."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and the exponential moving average of the weights."""

    lr: float = 1e-4
    lr_schedule: str = "constant"
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip: float = 0.0
    """Largest gradient norm; 0: no clipping."""
    ema_decay: float = 0.9999
    ema_warmup: bool = False
    """Let the decay rise as (1 + step) / (10 + step), so that a short run forgets its initial weights."""


@dataclass(frozen=True)
class DataConfig:
    """Where images come from."""

    kind: str = "digits"
    """"digits": the handwritten digits of scikit-learn; "images": a folder or zip of images, CLASS/NAME;
    "latents": VAE latents."""
    path: str = ""
    flip: bool = False
    """Mirror each image with probability one half."""


@dataclass(frozen=True)
class RunConfig:
    """What may differ from one start of a run to the next without changing what it learns."""

    run_dir: str = ""
    """Empty: runs/PRESET."""
    device: str = "auto"
    log_every: int = 10
    sample_every: int = 500
    checkpoint_every: int = 500
    check_quotient_every: int = 500
    """Updates between measurements of the cosine of the quotient with its float32 value on a few samples; 0: never."""
    keep: int = 2
    """How many of the newest checkpoints stay, at least 2: a damaged one needs one before it."""
    on_nonfinite: str = "stop"
    """What becomes of a step with a number that is not finite, which changes nothing in any case: "stop" ends the run,
    "skip" goes on, up to ten times in a row."""
    optimizer: str = "soflow"
    """Whose AdamW: "soflow" (one pass with averages and copies), "torch" (its fused one) or "apex" (FusedAdam)."""
    compile: bool = False
    """torch.compile for the blocks: "on", "off" or "auto": off until a record shows that it wins."""
    cuda_graph: bool = False
    """The step as one CUDA graph: "on", "off" or "auto", as above."""
    recompute: str = "none"
    """What the backward makes again to save memory, beside norms and GELUs: "none", "mlp" (the first product of each
    MLP), "block" (all of each block)."""
    attention: str = "auto"
    """Whose attention: "flash4", "flash3", "flash2", "xformers", "sdpa-cudnn", "sdpa-flash", "sdpa-efficient",
    "sdpa-math", "sdpa" (torch picks) or "auto": the one that is measured to be the fastest."""


@dataclass(frozen=True)
class Config:
    """One training run, resolved: the same Config and the same versions give the same weights."""

    preset: str = "digits"
    model: DiTConfig = field(default_factory=DiTConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    run: RunConfig = field(default_factory=RunConfig)
    steps: int = 400_000
    batch_size: int = 256
    """Global: over all ranks and micro-batches."""
    micro_batch: int = 0
    """Samples per forward and backward on one rank; 0: the rank's whole batch; -1, typed "auto": as many as the memory
    of the GPU is predicted to hold when the run starts. What is learnt is the same up to rounding."""
    precision: str = "auto"
    """"fp32", "tf32", "bf16", "fp8" (the blocks' products, by torchao) or "auto": bf16 on a GPU that has it, else
    fp32."""
    quotient: str = "auto"
    """"increments": value and increment side by side; "pair": two forwards and their difference; "auto": increments
    where products are rounded, a pair in float32."""
    quotient_precision: str = "auto"
    """Of the products behind the quotient: "bf16", "fp16", "tf32" or "fp32"; "auto": as in the rest of the step for
    increments, fp32 for a pair."""
    seed: int = 0


# The flags that people type every day, and the fields that they set.
SHORT_NAMES = {
    "run_dir": "run.run_dir",
    "data": "data.path",
    "steps": "steps",
    "batch_size": "batch_size",
    "micro_batch": "micro_batch",
    "precision": "precision",
    "quotient": "quotient",
    "quotient_precision": "quotient_precision",
    "teacher": "objective.teacher",
    "teacher_decay": "objective.teacher_decay",
    "seed": "seed",
    "device": "run.device",
    "optimizer": "run.optimizer",
    "compile": "run.compile",
    "cuda_graph": "run.cuda_graph",
    "recompute": "run.recompute",
    "attention": "run.attention",
    "checkpoint_every": "run.checkpoint_every",
    "keep": "run.keep",
    "on_nonfinite": "run.on_nonfinite",
}


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as nested dicts of JSON values."""
    return dataclasses.asdict(config)


def to_json(config: Config) -> str:
    """A configuration as JSON text, one field a line."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """A configuration as {"objective.eps": 0.01, ...}."""
    flat = {}
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            flat |= flatten(value, f"{prefix}{item.name}.")
        else:
            flat[prefix + item.name] = value
    return flat


def from_dict(values: Mapping[str, Any], base: Config | None = None) -> Config:
    """The inverse of `to_dict`; a field left out is as in `base`, by default `Config()`.

    Raises ValueError naming a wrong field.
    """
    return _build(base or Config(), values, "")


def from_json(text: str, base: Config | None = None) -> Config:
    """The inverse of `to_json`; a field left out is as in `base`. Raises ValueError naming what is wrong."""
    try:
        values = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    return from_dict(values, base)


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """`config` with some fields replaced, by short name ("run_dir") or full name ("objective.eps").

    Values may be text, as typed on a command line. Raises ValueError naming the field.
    """
    for name, value in changes.items():
        config = _replace(config, SHORT_NAMES.get(name, name).split("."), value, name)
    return config


def difference(old: Config, new: Config) -> list[str]:
    """The fields that make two runs different, as lines "objective.eps: 0.01 -> 0.1"; `run` and the
    micro-batch do not count."""
    before, after = flatten(old), flatten(new)
    changed = [name for name in before if before[name] != after[name] and not name.startswith(("run.", "micro_batch"))]
    return [f"{name}: {before[name]!r} -> {after[name]!r}" for name in changed]


def disagreement(old: Config, new: Config) -> list[str]:
    """`difference`; a field that `old` left open ("auto") is what it has come to in `new`."""
    open_fields = {name: flatten(new)[name] for name, value in flatten(old).items() if value == "auto"}
    return difference(override(old, open_fields), new)


def nearest(name: str, known: Any) -> str:
    """ " (did you mean ...?)" for a misspelt name, or nothing."""
    close = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _replace(node: Any, path: list[str], value: Any, full_name: str) -> Any:
    names = {item.name for item in fields(node)}
    head, rest = path[0], path[1:]
    inner = getattr(node, head, None) if head in names else None
    if head not in names or bool(rest) != is_dataclass(inner):
        known = [*flatten(Config()), *SHORT_NAMES]
        raise ValueError(f"unknown field {shown(full_name)}{nearest(full_name, known)}")
    if rest:
        return replace(node, **{head: _replace(inner, rest, value, full_name)})
    return replace(node, **{head: _coerce(value, get_type_hints(type(node))[head], full_name)})


def _build(base: Any, values: Any, prefix: str) -> Any:
    if not isinstance(values, Mapping):
        raise ValueError(f"{prefix.rstrip('.') or 'the configuration'} must be an object, got {shown(values)}")
    hints = get_type_hints(type(base))
    arguments = {}
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"unknown field {shown(prefix + str(name))}{nearest(str(name), hints)}")
        inner = getattr(base, name)
        if is_dataclass(inner):
            arguments[name] = _build(inner, value, f"{prefix}{name}.")
        else:
            arguments[name] = _coerce(value, hints[name], prefix + name)
    return replace(base, **arguments)


def _coerce(value: Any, hint: Any, name: str) -> Any:
    """`value`, from JSON or a command line, as the field's type."""
    kind, parts = get_origin(hint) or hint, get_args(hint)
    try:
        if kind is tuple:
            items = value.strip("()[] ").split(",") if isinstance(value, str) else list(value)
            if len(items) != len(parts):
                raise ValueError
            return tuple(_coerce(item, part, name) for item, part in zip(items, parts, strict=True))
        if kind is bool:
            if isinstance(value, str):
                return {"true": True, "false": False, "1": True, "0": False}[value.lower()]
            if not isinstance(value, bool):
                raise ValueError
            return value
        if isinstance(value, bool) or value is None:
            raise ValueError
        if kind is int:
            if name == "micro_batch" and value == "auto":
                return AUTO
            number = float(value) if isinstance(value, str) and not value.strip().lstrip("+-").isdigit() else value
            if isinstance(number, float) and not number.is_integer():
                raise ValueError
            return int(number)
        if kind is float:
            number = float(value)
            if not math.isfinite(number):
                raise ValueError
            return number
        if kind is str and isinstance(value, (str, os.PathLike)):
            return os.fspath(value)
        raise ValueError
    except (TypeError, ValueError, KeyError, OverflowError, AttributeError):
        what = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        wanted = what.get(kind, f"{len(parts)} numbers") + (" or auto" if name == "micro_batch" else "")
        raise ValueError(f"{name} must be {wanted}, got {shown(value)}") from None


def shown(value: Any) -> str:
    """A value as a message shows it: long ones shortened."""
    if isinstance(value, int) and value.bit_length() > 1000:  # Python refuses to write the longest
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
