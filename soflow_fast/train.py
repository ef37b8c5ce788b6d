"""Train: `python -m soflow_fast.train [PRESET] [flags]`; without arguments, the handwritten digits.

    python -m soflow_fast.train                                   digits, about two minutes on two CPU cores
    python -m soflow_fast.train cifar10 --data cifar10-train.zip
    python -m soflow_fast.train imagenet256-xl2 --dry-run         what such a run needs
    python -m soflow_fast.train digits --set objective.p=0.5      any field of config.json

The same command again resumes.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

# Before torch loads OpenMP: by default its idle threads spin for milliseconds, which on busy cores takes the core from
# the thread that they wait for. Beside one other process on two cores a step took six times as long, with brief
# spinning two and a half times; alone the two are equal.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from .commands import process
from .commands.parser import Parser, configure
from .config.presets import PRESETS, preset
from .config.schema import SHORT_NAMES, Config, from_json
from .errors import ConfigError
from .files import TEXT, read_file


def parser() -> Parser:
    """The command line."""
    p = Parser(prog="python -m soflow_fast.train", description=__doc__)
    p.add_argument("preset", nargs="?", metavar="PRESET", help=f"{', '.join(PRESETS)} (default: digits)")
    p.add_argument(
        "--config",
        metavar="FILE",
        help="start from a config.json instead of a preset; another --precision or --teacher chooses the quotient anew",
    )
    p.add_argument("--run-dir", metavar="DIR", help="where everything is written (default: runs/PRESET)")
    p.add_argument("--data", metavar="PATH", help="folder or zip of images, CLASS/NAME")
    p.add_argument("--steps", metavar="N", help="updates in the whole run")
    p.add_argument("--batch-size", metavar="N", help="images per update")
    p.add_argument(
        "--micro-batch", metavar="N", help="images per forward and backward; auto: as many as fit (default: the batch)"
    )
    p.add_argument("--precision", metavar="P", help="auto, fp32, tf32, bf16 or fp8 (the blocks' products, by torchao)")
    p.add_argument("--quotient", metavar="Q", help="increments or pair: how the consistency quotient is taken (auto)")
    p.add_argument(
        "--quotient-precision", metavar="P", help="bf16, fp16, tf32 or fp32: of the products behind it (auto)"
    )
    p.add_argument(
        "--teacher",
        metavar="T",
        help="student: the published stop-gradient target; ema: the increment of an average of the weights; "
        "ema-literal: the average at one end only, for comparison: it does not train, as the difference between the "
        "two networks is divided by t - l",
    )
    p.add_argument("--teacher-decay", metavar="D", help="decay of the teacher's average (default: 0.99)")
    p.add_argument("--seed", metavar="N", help="of initialisation, data order, noise and times")
    p.add_argument("--device", metavar="D", help="auto, cpu, cuda, cuda:1, ...")
    p.add_argument("--optimizer", metavar="O", help="soflow, torch or apex: whose fused AdamW (soflow)")
    switch: Any = {"action": argparse.BooleanOptionalAction, "default": None}
    p.add_argument("--compile", **switch, help="torch.compile for the blocks (off)")
    p.add_argument("--cuda-graph", **switch, help="the whole step as one CUDA graph (off)")
    p.add_argument(
        "--recompute", metavar="R", help="none, mlp or block: what the backward makes again to save memory (none)"
    )
    p.add_argument(
        "--attention",
        metavar="NAME",
        help="auto (the fastest here), sdpa (torch picks), sdpa-cudnn, sdpa-flash, sdpa-efficient, sdpa-math, flash2, "
        "flash3, flash4 or xformers; --env says which are usable",
    )
    p.add_argument("--checkpoint-every", metavar="N", help="updates between checkpoints; 0: only the last")
    p.add_argument("--keep", metavar="N", help="how many of the newest checkpoints stay, at least 2 (2)")
    p.add_argument(
        "--on-nonfinite",
        metavar="W",
        help="stop or skip: end the run at a number that is not finite, or leave out up to ten in a row (stop)",
    )
    p.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="any other field of config.json")
    p.add_argument("--dry-run", action="store_true", help="build everything, make one step, print what the run needs")
    p.add_argument("--env", action="store_true", help="print versions, devices, kernels and attention in use")
    return p


def configuration(arguments: list[str] | None = None) -> tuple[Config, bool, bool]:
    """The configuration of a command line, and whether --dry-run and --env were given. Raises ConfigError."""
    values = parser().parse(arguments)
    if values.config and values.preset:
        raise ConfigError(f"--config {values.config} and preset {values.preset}: give one of the two")
    config = _read(values.config) if values.config else preset(values.preset or "digits")
    changes = {name: getattr(values, name) for name in SHORT_NAMES if getattr(values, name) is not None}
    changes |= {name: "on" if value else "off" for name, value in changes.items() if isinstance(value, bool)}
    for text in values.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text}: must be FIELD=VALUE")
        changes[name] = value
    named = {SHORT_NAMES.get(name, name) for name in changes}
    if values.config and named & {"precision", "objective.teacher"}:  # what followed from them follows anew
        changes |= {name: "auto" for name in ("quotient", "quotient_precision") if name not in named}
    return configure(config, changes), values.dry_run, values.env


def _read(path: str) -> Config:
    try:
        text = read_file(Path(path), TEXT, follow=True).decode()
        named = from_json(text).preset  # what the file leaves out is as in the preset that it names
        return from_json(text, preset(named))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"--config {path}: {error}") from None


def main(arguments: list[str] | None = None) -> None:
    """Parse and do. Raises UserError and Interrupted."""
    config, dry_run, env = configuration(arguments)
    if env:
        from .commands.environment import report

        print(report(config.run.device))
    elif dry_run:
        from .commands.dry_run import dry_run as try_out

        print(try_out(config))
    else:
        from .runs.trainer import train

        train(config)


if __name__ == "__main__":
    process.run(lambda: main(sys.argv[1:]))
