"""The meaning of a configuration: every check names its field.

`validate` is called once, where a configuration enters: from a command line (`commands.parser.configure`), from a
checkpoint, and from a library user's hands in `TrainState.build`; code behind those takes it as it is. `DiT`,
`SolutionFlow` and `Objective` check their own part, as users build them directly. `runs.trainer.resolved` then replaces
what was left open ("auto") by what it comes to on this machine, once for each run.
"""

import os
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .schema import AUTO, TYPES, Config, DiTConfig, FlowConfig, ObjectiveConfig, check_type, flatten, nearest, shown

# What float32 holds: beyond, torch raises in the midst of a step or takes 0 for a number.
SMALLEST, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127


def validate(config: Config) -> Config:
    """Check the meaning of every field and return `config`. Raises ValueError naming the first wrong field."""
    for name, value in flatten(config).items():
        check_type(name, value)
        for number in value if isinstance(value, tuple) else (value,):
            holds = TYPES[name] not in (float, tuple[float, float]) or number == 0 or SMALLEST <= abs(number) <= LARGEST
            _require(holds, name, "0 or of a size from 1.2e-38 to 3.4e38, as float32 is", value)
    validate_model(config.model, "model.")
    validate_flow(config.flow, "flow.")
    validate_objective(config.objective, "objective.")
    optim, run = config.optim, config.run
    for section, prefix in ((optim, "optim."), (config.data, "data."), (run, "run."), (config, "")):
        _check_choices(section, prefix)
    for name in ("lr", "eps"):
        _require(getattr(optim, name) > 0, f"optim.{name}", "above 0", getattr(optim, name))
    _require(optim.warmup_steps >= 0, "optim.warmup_steps", "at least 0", optim.warmup_steps)
    _require(all(0 <= beta < 1 for beta in optim.betas), "optim.betas", "two numbers in [0, 1)", optim.betas)
    _require(optim.weight_decay >= 0, "optim.weight_decay", "at least 0", optim.weight_decay)
    _require(optim.grad_clip >= 0, "optim.grad_clip", "at least 0", optim.grad_clip)
    _require(0 <= optim.ema_decay < 1, "optim.ema_decay", "in [0, 1)", optim.ema_decay)
    for name, path in (("data.path", config.data.path), ("run.run_dir", run.run_dir)):
        _require(_can_be_a_name(path), name, "a name that a file can have, without zero byte or lone surrogate", path)
    for name, least in (
        ("log_every", 1),
        ("sample_every", 0),
        ("checkpoint_every", 0),
        ("check_quotient_every", 0),
        ("keep", 2),
    ):
        _require(getattr(run, name) >= least, f"run.{name}", f"at least {least}", getattr(run, name))
    _require(1 <= config.steps < 10**8, "steps", "in [1, 10^8)", config.steps)  # a checkpoint's name has 8 digits
    _require(1 <= config.batch_size <= 2**20, "batch_size", "in [1, 2^20]", config.batch_size)
    _require(config.micro_batch >= AUTO, "micro_batch", "at least 0, or auto", config.micro_batch)
    _require(0 <= config.seed < 2**63, "seed", "in [0, 2^63)", config.seed)
    return config


def validate_model(model: DiTConfig, prefix: str = "") -> None:
    """Check a DiTConfig. Raises ValueError naming the field."""
    for name in ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes"):
        value = getattr(model, name)
        least = 0 if name == "num_classes" else 1
        _require(isinstance(value, int) and value >= least, prefix + name, f"a whole number of at least {least}", value)
    limits = {"input_size": 2**12, "in_channels": 2**12, "hidden_size": 2**16, "depth": 1000, "num_classes": 2**24}
    for name, most in limits.items():
        _require(getattr(model, name) <= most, prefix + name, f"at most {most}", getattr(model, name))
    _require(0 < model.mlp_ratio <= 64, prefix + "mlp_ratio", "above 0 and at most 64", model.mlp_ratio)
    _require(
        model.hidden_size * model.mlp_ratio >= 1, prefix + "mlp_ratio", "at least 1 / hidden_size", model.mlp_ratio
    )
    _require(
        model.input_size % model.patch_size == 0,
        prefix + "patch_size",
        f"a divisor of input_size {model.input_size}",
        model.patch_size,
    )
    _require(
        model.hidden_size % model.num_heads == 0,
        prefix + "num_heads",
        f"a divisor of hidden_size {model.hidden_size}",
        model.num_heads,
    )
    _require(
        model.hidden_size % 4 == 0, prefix + "hidden_size", "a multiple of 4 (2-D sin-cos positions)", model.hidden_size
    )


def validate_flow(flow: FlowConfig, prefix: str = "") -> None:
    """Check a FlowConfig. Raises ValueError naming the field."""
    _check_choices(flow, prefix)


def validate_objective(objective: ObjectiveConfig, prefix: str = "") -> None:
    """Check an ObjectiveConfig. Raises ValueError naming the field."""
    _check_choices(objective, prefix)
    _require(objective.guidance_scale >= 1, prefix + "guidance_scale", "at least 1", objective.guidance_scale)
    _require(
        objective.guidance_decay_time >= 0, prefix + "guidance_decay_time", "at least 0", objective.guidance_decay_time
    )
    for name in ("mix_ratio", "fm_fraction", "label_drop"):
        _require(0 <= getattr(objective, name) <= 1, prefix + name, "in [0, 1]", getattr(objective, name))
    _require(objective.p >= 0, prefix + "p", "at least 0", objective.p)
    _require(objective.eps > 0, prefix + "eps", "above 0", objective.eps)
    for name in ("r_init", "r_end"):
        _require(0 < getattr(objective, name) <= 1, prefix + name, "in (0, 1]", getattr(objective, name))
    _require(0 <= objective.teacher_decay < 1, prefix + "teacher_decay", "in [0, 1)", objective.teacher_decay)
    usual = ObjectiveConfig().teacher_decay
    _require(
        objective.teacher != "student" or objective.teacher_decay == usual,
        prefix + "teacher_decay",
        f"left at {usual} with the teacher student, which is no average",
        objective.teacher_decay,
    )
    for name in ("fm_time", "sc_time", "sc_end_time"):
        _require(
            getattr(objective, name)[1] > 0, prefix + name, "a mean and a deviation above 0", getattr(objective, name)
        )


def _can_be_a_name(path: str) -> bool:
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False


def _require(holds: bool, name: str, what: str, value: Any) -> None:
    if not holds:
        raise ValueError(f"{name} must be {what}, got {shown(value)}")


def _check_choices(section: Any, prefix: str) -> None:
    """Check the fields of one section that are a `Literal`."""
    for name, allowed in _choices(type(section)).items():
        value = getattr(section, name)
        if value not in allowed:
            what = f"one of {', '.join(allowed)}"
            raise ValueError(f"{prefix}{name} must be {what}, got {shown(value)}{nearest(str(value), allowed)}")


@cache
def _choices(kind: type) -> dict[str, tuple[str, ...]]:
    return {name: get_args(hint) for name, hint in get_type_hints(kind).items() if get_origin(hint) is Literal}
