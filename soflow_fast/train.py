"""Train: `python -m soflow_fast.train [PRESET] [flags]`; without arguments, the handwritten digits.

    python -m soflow_fast.train                                   digits, about two minutes on two CPU cores
    python -m soflow_fast.train digits --latent                   through a VAE, trained first
    python -m soflow_fast.train cifar10 --data cifar10-train.zip
    python -m soflow_fast.train imagenet256-xl2 --dry-run         what such a run needs
    python -m soflow_fast.train imagenet256-xl2 --dry-run --gpu h100    and how fast a step is predicted to be
    python -m soflow_fast.train imagenet256-xl2 --dry-run --gpus 8 --nodes 2 --parallel fsdp    on 16 GPUs
    python -m soflow_fast.train digits --set objective.p=0.5      any field of config.json

The same command again resumes.
"""

import argparse
import os
import sys
from pathlib import Path

# Before torch loads OpenMP: by default its idle threads spin for milliseconds, which on busy cores takes the core from
# the thread that they wait for. Beside one other process on two cores a step took six times as long, with brief
# spinning two and a half times; alone the two are equal.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from .commands import process
from .commands.parser import Parser, add_fields, configure, whole_number
from .config.authors import from_authors, is_theirs, read_yaml
from .config.gpus import GPUS
from .config.presets import PRESETS, preset
from .config.schema import SHORT_NAMES, Config, DataChoices, from_json
from .errors import ConfigError
from .files import TEXT, read_file

MOST_EPOCHS = 10**6
MOST_GPUS, MOST_NODES = 1024, 2**16

FLAGS = {
    "the run": "run_dir init resume_official steps seed device eval_every reference checkpoint_every keep "
    "on_nonfinite track",
    "the data": "data resize skip_bad batch_size conditions condition_size",
    "learning": "objective teacher teacher_decay guidance_range guidance_precision quotient quotient_precision",
    "speed and memory": "precision micro_batch recompute attention optimizer compile cuda_graph parallel",
}
"""The flags that set a field, by the heading under which --help shows them."""


def parser() -> Parser:
    """The command line."""
    p = Parser(
        prog="python -m soflow_fast.train",
        usage="python -m soflow_fast.train [PRESET] [flags]",
        description=(__doc__ or "").partition("\n\n")[2],
        add_help=False,
    )
    groups = {title: p.add_argument_group(title) for title in (*FLAGS, "diagnosis")}
    run, diagnosis = groups["the run"], groups["diagnosis"]
    run.add_argument("preset", nargs="?", metavar="PRESET", help=f"{', '.join(PRESETS)} (default digits)")
    run.add_argument("--latent", action="store_true", help="The digits as latents, of a VAE that is trained first")
    run.add_argument("--config", metavar="FILE", help="Start from a config.json, or the authors' config.yaml")
    run.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="Set any other field of config.json"
    )
    run.add_argument("--epochs", metavar="N", help="In place of --steps: so many passes over the data")
    presets = [make() for make in PRESETS.values()]
    for title, names in FLAGS.items():
        add_fields(groups[title], names.split(), presets)
    diagnosis.add_argument("-h", "--help", action="help", help="Show this")
    diagnosis.add_argument(
        "--dry-run", action="store_true", help="Build everything, make one step, print what the run needs"
    )
    diagnosis.add_argument(
        "--gpu", choices=list(GPUS), metavar="NAME", help=f"With --dry-run: predict a step on a GPU; {', '.join(GPUS)}"
    )
    diagnosis.add_argument(
        "--gpus",
        metavar="N",
        help="With --dry-run: predict a step on many GPUs, N in each node (--gpu, default h100)",
    )
    diagnosis.add_argument("--nodes", metavar="N", help="With --gpus: nodes, as 2 of 8 GPUs are 16 in all (default 1)")
    diagnosis.add_argument("--env", action="store_true", help="Print versions, devices, kernels and attention in use")
    return p


def configuration(arguments: list[str] | None = None) -> tuple[Config, argparse.Namespace]:
    """The configuration of a command line, and its other flags. Raises ConfigError."""
    values = parser().parse(arguments)
    if values.gpu and not values.dry_run:
        raise ConfigError(f"--gpu {values.gpu}: it is what --dry-run predicts for; give both")
    if values.gpus is not None and not values.dry_run:
        raise ConfigError(f"--gpus {values.gpus}: they are what --dry-run predicts for; give both")
    if values.nodes is not None and values.gpus is None:
        raise ConfigError(f"--nodes {values.nodes}: goes with --dry-run --gpus N, the GPUs of each node")
    if values.config and values.preset:
        raise ConfigError(f"--config {values.config} and preset {values.preset}: give one of the two")
    name = values.preset or "digits"
    if values.latent and (values.config or name not in ("digits", "digits-latent")):
        given = f"--config {values.config}" if values.config else f"preset {name}"
        raise ConfigError(f"--latent: is of the digits, not of {given}; python -m soflow_fast.encode makes latents")
    config = _read(values.config) if values.config else preset("digits-latent" if values.latent else name)
    changes = {name: getattr(values, name) for name in SHORT_NAMES if getattr(values, name) is not None}
    for text in values.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text}: must be FIELD=VALUE")
        changes[name] = value
    if values.epochs is not None and "steps" in changes:
        raise ConfigError(f"--epochs {values.epochs} and --steps {changes['steps']}: give one of the two")
    named = {SHORT_NAMES.get(name, name) for name in changes}
    if values.config and named & {
        "precision",
        "objective.kind",
        "objective.teacher",
    }:  # what followed from them follows anew
        changes |= {name: "auto" for name in ("quotient", "quotient_precision") if name not in named}
    return configure(config, changes), values


def _read(path: str) -> Config:
    try:
        text = read_file(Path(path), TEXT, follow=True).decode()
        if is_theirs(text):
            return from_authors(read_yaml(text))
        config = from_json(text)
        return from_json(text, preset(config.preset))  # what the file leaves out is as in the preset that it names
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"--config {path}: {error}") from None


def data_choices(values: argparse.Namespace) -> DataChoices:
    """What a command line leaves to the data."""
    epochs = None if values.epochs is None else whole_number("--epochs", values.epochs, 1, MOST_EPOCHS)
    given = values.config is not None or any(text.partition("=")[0] == "model.num_classes" for text in values.set)
    return DataChoices(classes_fixed=given, epochs=epochs)


def main(arguments: list[str] | None = None) -> None:
    """Parse and do. Raises UserError and Interrupted."""
    config, values = configuration(arguments)
    choices = data_choices(values)
    if values.env or values.dry_run:
        process.alone(
            "train --env" if values.env else "train --dry-run", "speaks of one machine; --gpus predicts for more"
        )
    if values.env:
        from .commands.environment import report

        print(report(config.run.device))
    elif values.gpus is not None:
        gpus = whole_number("--gpus", values.gpus, 1, MOST_GPUS)
        nodes = 1 if values.nodes is None else whole_number("--nodes", values.nodes, 1, MOST_NODES)
        from .commands.many_gpus import predict

        print(predict(config, values.gpu or "h100", gpus, nodes, choices))
    elif values.dry_run:
        from .commands.dry_run import dry_run

        print(dry_run(config, values.gpu, choices))
    else:
        with process.held():
            from .runs.trainer import train
        train(config, choices)


if __name__ == "__main__":
    process.run(lambda: main(sys.argv[1:]))
