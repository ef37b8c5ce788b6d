"""The meaning of a configuration: every check names its field.

`validate` is called where a configuration enters, and nowhere behind: from a command line (`commands.parser`), from a
checkpoint (`runs.checkpoint`), and from a library user's hands (`TrainState.build`, where one from a command line
passes again, in a tenth of a millisecond). `DiT`, `SolutionFlow` and `Objective` check their own part, as users build
them directly. `runs.trainer.resolved` replaces what was left open ("auto") by what it comes to on this machine, once
for each run.
"""

import os
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .schema import (
    AUTO,
    RANGE,
    TYPES,
    Config,
    DiTConfig,
    FlowConfig,
    ModelConfig,
    ObjectiveConfig,
    UNetConfig,
    check_type,
    flatten,
    nearest,
    shown,
)

# What float32 holds: beyond, torch raises in the midst of a step or takes 0 for a number.
SMALLEST, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127
MOST_GUIDANCE = 1000.0
"""Guidance scale beyond which an embedder of 1 - 1/w hardly tells one from another."""


def validate(config: Config) -> Config:
    """Check the meaning of every field and return `config`. Raises ValueError naming the first wrong field."""
    for name, value in flatten(config).items():
        check_type(name, value)
        if TYPES[name] in (float, tuple[float, float], RANGE) and value is not None:
            numbers = value if isinstance(value, tuple) else (value,)
            if not all(number == 0 or SMALLEST <= abs(number) <= LARGEST for number in numbers):
                what = "0 or of a size from 1.2e-38 to 3.4e38, as float32 is"
                raise ValueError(f"{name} must be {what}, got {shown(value)}")
    validate_model(config.model, "model.")
    validate_flow(config.flow, "flow.")
    validate_objective(config.objective, "objective.")

    optim = config.optim
    check = _checks(optim, "optim.")
    check("lr", optim.lr > 0, "above 0")
    check("eps", optim.eps > 0, "above 0")
    check("warmup_steps", optim.warmup_steps >= 0, "at least 0")
    check("betas", all(0 <= beta < 1 for beta in optim.betas), "two numbers in [0, 1)")
    check("weight_decay", optim.weight_decay >= 0, "at least 0")
    check("grad_clip", optim.grad_clip >= 0, "at least 0")
    check("ema_decay", 0 <= optim.ema_decay < 1, "in [0, 1)")
    check("ema_every", 1 <= optim.ema_every <= 10**6, "in [1, 10^6]")
    fits = optim.kind == "radam" or optim.ema_precision == "fp32"
    check("ema_precision", fits, "fp32 unless optim.kind is radam, whose state has room for the float64 average")

    check = _checks(config.data, "data.")
    check("augment", 0 <= config.data.augment <= 1, "in [0, 1]")
    check("augment", not config.data.augment or _sees_augmentation(config.model), "0 without model.augmentation_labels")
    check("augment", not config.data.augment or not config.data.flip, "0 beside data.flip, as it mirrors by itself")
    a_name = "a name that a file can have, without zero byte or lone surrogate"
    check("path", _can_be_a_name(config.data.path), a_name)
    check("conditions", _can_be_a_name(config.data.conditions), a_name)
    run = config.run
    check = _checks(run, "run.")
    check("run_dir", _can_be_a_name(run.run_dir), a_name)
    check("init", _can_be_a_name(run.init), a_name)
    check("resume_official", _can_be_a_name(run.resume_official), a_name)
    check("resume_official", not (run.init and run.resume_official), "empty beside run.init, which begins at step 0")
    check("workers", AUTO <= run.workers <= 256, "in [-1, 256]")
    check("log_every", run.log_every >= 1, "at least 1")
    check("sample_every", run.sample_every >= 0, "at least 0")
    check("eval_every", run.eval_every >= 0, "at least 0")
    judged = bool(run.reference) or config.data.of_digits
    check("eval_every", judged or not run.eval_every, "0 without run.reference, as the data are no digits")
    check("eval_samples", run.eval_samples == 0 or 100 <= run.eval_samples <= 10**6, "0, or in [100, 10^6]")
    for name in ("reference", "inception", "dinov2"):
        check(name, _can_be_a_name(getattr(run, name)), a_name)
    check("checkpoint_every", run.checkpoint_every >= 0, "at least 0")
    check("check_quotient_every", run.check_quotient_every >= 0, "at least 0")
    check("keep", run.keep >= 2, "at least 2")
    fits = config.optim.kind == "adamw" or run.optimizer == "soflow"
    check("optimizer", fits, "left at soflow with optim.kind radam: the implementations are of AdamW")
    fits = config.optim.kind == "adamw" or run.parallel == "ddp"
    check("parallel", fits, "ddp with optim.kind radam, whose state is not cut over ranks")
    if isinstance(config.model, UNetConfig):
        _validate_unet_run(config)
    check("shard_ranks", 0 <= run.shard_ranks <= 2**20, "in [0, 2^20]")
    check("shard_ranks", not run.shard_ranks or run.parallel == "hsdp", "0 unless run.parallel is hsdp")
    check("hang_seconds", 0 <= run.hang_seconds <= 10**6, "in [0, 10^6]")

    objective = config.objective
    euler = objective.kind != "meanflow" or config.flow.coefficients == "euler"
    what = "euler with the objective meanflow, whose network is the average velocity"
    _checks(config.flow, "flow.")("coefficients", euler, what)
    if isinstance(config.model, DiTConfig):
        unasked = config.model.null_label or (objective.label_drop == 0 and objective.guidance_scale == 1)
        what = "true unless objective.label_drop is 0 and objective.guidance_scale is 1"
        _checks(config.model, "model.")("null_label", unasked, what)

    check = _checks(config, "")
    for name in ("quotient", "quotient_precision"):
        fits = objective.kind != "flow-matching" or getattr(config, name) == "auto"
        check(name, fits, "left at auto with the objective flow-matching, which has no quotient")
    check("steps", 1 <= config.steps < 10**8, "in [1, 10^8)")  # a checkpoint's name has 8 digits
    check("batch_size", 1 <= config.batch_size <= 2**20, "in [1, 2^20]")
    check("micro_batch", config.micro_batch >= AUTO, "at least 0, or auto")
    check("seed", 0 <= config.seed < 2**63, "in [0, 2^63)")
    return config


def validate_model(model: ModelConfig, prefix: str = "") -> None:
    """Check the shape of a network. Raises ValueError naming the field."""
    check = _checks(model, prefix)
    check("kind", model.kind == type(model)().kind, f"{type(model)().kind} in a {type(model).__name__}")
    if isinstance(model, UNetConfig):
        _validate_unet(model, prefix)
        return
    sizes = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads")
    for name in (*sizes, "num_classes", "condition_size"):
        value, least = getattr(model, name), 1 if name in sizes else 0
        check(name, isinstance(value, int) and value >= least, f"a whole number of at least {least}")
    limits = {"input_size": 2**12, "in_channels": 2**12, "hidden_size": 2**16, "depth": 1000, "num_classes": 2**24}
    limits["condition_size"] = 2**16
    for name, most in limits.items():
        check(name, getattr(model, name) <= most, f"at most {most}")
    check("mlp_ratio", 0 < model.mlp_ratio <= 64, "above 0 and at most 64")
    check("mlp_ratio", model.hidden_size * model.mlp_ratio >= 1, "at least 1 / hidden_size")
    check("patch_size", model.input_size % model.patch_size == 0, f"a divisor of input_size {model.input_size}")
    check("num_heads", model.hidden_size % model.num_heads == 0, f"a divisor of hidden_size {model.hidden_size}")
    check("hidden_size", model.hidden_size % 4 == 0, "a multiple of 4 (2-D sin-cos positions)")
    check("num_classes", not (model.num_classes and model.condition_size), "0 beside a condition_size, of vectors")
    check("null_label", model.null_label or model.conditional, "true where there are no classes and no vectors")
    validate_guidance_range(model.guidance_range, prefix)
    if model.guidance_range is not None:
        between = model.null_label and model.conditional
        check("guidance_range", between, "none for a network without classes or null label, which guidance is between")


def _validate_unet(model: UNetConfig, prefix: str) -> None:
    check = _checks(model, prefix)
    limits = {"input_size": 2**12, "in_channels": 2**12, "channels": 2**14, "blocks": 100}
    for name, most in limits.items():
        value = getattr(model, name)
        check(name, isinstance(value, int) and 1 <= value <= most, f"a whole number from 1 to {most}")
    check("channels", model.channels % 8 == 0, "a multiple of 8")
    levels = len(model.multipliers)
    check("multipliers", 1 <= levels <= 8 and all(1 <= m <= 64 for m in model.multipliers), "1 to 8 numbers of 1 to 64")
    halved = 2 ** (levels - 1)
    check("input_size", model.input_size % halved == 0, f"a multiple of {halved}, as {levels} levels halve it")
    sides = [model.input_size // 2**k for k in range(levels)]
    check(
        "attention_sizes", set(model.attention_sizes) <= {0, *sides}, f"of {', '.join(map(str, sides))}, or 0 for none"
    )
    check("dropout", 0 <= model.dropout < 1, "in [0, 1)")


def _validate_unet_run(config: Config) -> None:
    """What a run of a U-Net has no use for. Raises ValueError naming the field."""
    run, check = config.run, _checks(config.run, "run.")
    check("parallel", run.parallel == "ddp", "ddp with a U-Net, whose parameters are not cut over ranks")
    check("compile", not run.compile, "false with a U-Net, which has no compiled blocks")
    check("cuda_graph", not run.cuda_graph, "left out with a U-Net, whose steps are not recorded")
    check("recompute", run.recompute != "mlp", "auto, nothing, none or block with a U-Net, which has no MLPs")
    check("attention", run.attention == "auto", "auto with a U-Net, whose attention is its own")
    check("mlp", run.mlp == "auto", "auto with a U-Net, which has no MLPs")
    check = _checks(config, "")
    check("precision", config.precision != "fp8", "auto, fp32, tf32 or bf16 with a U-Net")
    check("guidance_precision", config.guidance_precision == "step", "step with a U-Net, which has no guidance")
    what = "auto or pair with a U-Net: increments are of the DiT alone"
    check("quotient", config.quotient != "increments", what)


def _sees_augmentation(model: ModelConfig) -> bool:
    return isinstance(model, UNetConfig) and model.augmentation_labels


def validate_guidance_range(found: tuple[float, float] | None, prefix: str = "") -> None:
    """Raise ValueError for a range of guidance scales that is none."""
    fits = found is None or (isinstance(found, tuple) and len(found) == 2)
    low, high = found if fits and found is not None else (1, 2)
    if not (fits and 1 <= low < high <= MOST_GUIDANCE):
        what = f"none or two numbers a, b with 1 <= a < b <= {MOST_GUIDANCE:g}"
        raise ValueError(f"{prefix}guidance_range must be {what}, got {shown(found)}")


def validate_flow(flow: FlowConfig, prefix: str = "") -> None:
    """Check a FlowConfig. Raises ValueError naming the field."""
    _checks(flow, prefix)


def validate_objective(objective: ObjectiveConfig, prefix: str = "") -> None:
    """Check an ObjectiveConfig. Raises ValueError naming the field."""
    check = _checks(objective, prefix)
    check("guidance_scale", objective.guidance_scale >= 1, "at least 1")
    check("guidance_decay_time", objective.guidance_decay_time >= 0, "at least 0")
    for name in ("mix_ratio", "fm_fraction", "label_drop"):
        check(name, 0 <= getattr(objective, name) <= 1, "in [0, 1]")
    check("p", objective.p >= 0, "at least 0")
    check("eps", objective.eps > 0, "above 0")
    for name in ("r_init", "r_end"):
        check(name, 0 < getattr(objective, name) <= 1, "in (0, 1]")
    check("teacher_decay", 0 <= objective.teacher_decay < 1, "in [0, 1)")
    usual = ObjectiveConfig().teacher_decay
    fits = objective.teacher != "student" or objective.teacher_decay == usual
    check("teacher_decay", fits, f"left at {usual} with the teacher student, which is no average")
    fits = objective.kind != "flow-matching" or objective.teacher == "student"
    check("teacher", fits, "student with the objective flow-matching, whose target is the data's velocity")
    for name in ("fm_time", "sc_time", "sc_end_time", "mf_time"):
        check(name, getattr(objective, name)[1] > 0, "a mean and a deviation above 0")


def _checks(section: Any, prefix: str) -> Callable[[str, bool, str], None]:
    """Check the fields of a section that are a `Literal`; `check(name, holds, what)` is for the others.

    It raises ValueError, saying what the field must be, where a condition does not hold.
    """

    def check(name: str, holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(f"{prefix}{name} must be {what}, got {shown(getattr(section, name))}")

    for name, allowed in _choices(type(section)).items():
        value = getattr(section, name)
        if value not in allowed:
            hint = nearest(str(value), allowed)
            raise ValueError(f"{prefix}{name} must be one of {', '.join(allowed)}, got {shown(value)}{hint}")
    return check


@cache
def _choices(kind: type) -> dict[str, tuple[str, ...]]:
    return {name: get_args(hint) for name, hint in get_type_hints(kind).items() if get_origin(hint) is Literal}


def _can_be_a_name(path: str) -> bool:
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False
