"""What the tests change of the commands and code on the pages, so that they end in seconds, and what they leave out."""

import re
from typing import NamedTuple

FEW = "--device cpu --batch-size 8 --set=run.eval_samples=100"
DIT = f"{FEW} --set=model.hidden_size=16 --set=model.depth=1 --set=model.num_heads=2"
UNET = "--set=model.channels=16 --set=model.multipliers=1,2 --set=model.blocks=1 --set=model.attention_sizes=16"


class Added(NamedTuple):
    """Flags behind every command that matches."""

    command: str
    """A regular expression, found anywhere in the command."""
    flags: str
    why: str


ADDED = (
    Added(r"soflow_fast\.train(?!.* --gpus| --env| policy| \S+-unet)", DIT, "a tiny network"),
    Added(r"soflow_fast\.train \S+-unet", f"{FEW} --batch-size 2 {UNET}", "a tiny U-Net"),
    Added(r"soflow_fast\.train policy", f"{FEW} --set=model.hidden_size=16", "a tiny policy"),
    Added(r"soflow_fast\.train(?!.* --gpus| --env|.* --epochs)", "--steps 2", "two steps"),
    Added(r"soflow_fast\.train .*--epochs", "--epochs 1", "an epoch"),
    Added(
        r"soflow_fast\.train --(attention|set|guidance|config THEIR)", "--run-dir runs/line-{line}", "other settings"
    ),
    Added(r"soflow_fast\.train .*--track wandb", "--track none", "no service is reached"),
    Added(r"soflow_fast\.sample .*--n 50000", "--n 10 --batch-size 8", "ten images"),
    Added(r"soflow_fast\.sample THEIR_DIR", "--n 2", "two images of a network of public size"),
    Added(r"soflow_fast\.evaluate .*--reference", "--metrics fd-random,recall-random", "no weights are downloaded"),
    Added(r"soflow_fast\.evaluate runs", "--n 100", "as few samples as it takes"),
    Added(r"soflow_kernels\.inspect", "--arch 80 --only lookahead", "one kernel for one architecture"),
)

CLEARED = {
    r"soflow_fast\.encode ": "latents",
    r"soflow_fast\.(sample|export) ": "out",
}
"""Folders that an earlier example has left, removed before a command that makes its own."""

REPLACED = {
    "docs/sampling.md": {
        'named("XL/2")': 'named("S/2")',  # XL/2 takes minutes and 10 GB on a CPU
        'flow.push_to_hub("me/digits-soflow", private=True)': 'flow.save_pretrained("me/digits-soflow")',  # no hub here
        'pipe.to("cuda", torch.bfloat16)': 'pipe.to("cpu", torch.bfloat16)',  # there is no GPU
        "pipe.enable_model_cpu_offload()": "",  # which asks for a GPU
    },
    "docs/authors.md": {'"weights.pt", num_classes=7': '"alone/weights.pt", num_classes=7'},  # no config.yaml beside it
    "docs/policies.md": {"state})": "torch.zeros(2, 3)})"},  # what a robot observes
}
"""Parts of code that stand for something else here. Each must be on its page."""

NO_INDEX = "installs packages"
TORCHRUN = "takes as many GPUs; tests/reliability and tests/training start ranks"
PUBLIC = "of public sizes alone, gigabytes; tests/commands/test_export.py"
NOT_RUN = {
    "git clone <this repository> && cd soflow-fast": "the repository is here",
    "make train": "sets up an environment; what it calls, `soflow_fast.train`, is run",
    "pip install -c constraints.txt -e .": NO_INDEX,
    "pip install ./kernels": NO_INDEX,
    "pip install 'soflow-fast[policy]'": NO_INDEX,
    "pip install wandb": NO_INDEX,
    "wandb login": "asks a service",
    "pytest benchmarks/test_kernels.py --record": "measures for minutes; tests/benchmarks run it small",
    "torchrun --standalone --nproc-per-node 8 -m soflow_fast.train imagenet256-xl2": TORCHRUN,
    "torchrun --nnodes 2 --nproc-per-node 8": TORCHRUN,
    "python -m soflow_fast.export RUN OUT --format authors": PUBLIC,
    "python -m soflow_fast.export runs/imagenet256-b4 out --format authors": PUBLIC,
    "#!/bin/bash": "a job of Slurm",
    "[Unit]": "a unit of systemd",
    "python -m soflow_fast.train [PRESET]": "a synopsis",
    "python -m soflow_fast.encode IMAGES OUT [--vae NAME]": "a synopsis",
}
"""Commands and scripts that are not run, by how they begin, with the reason. Calls of the engine in them are parsed."""

SLOW = {
    "README.md",
    "docs/authors.md",
    "docs/conditions.md",
    "docs/data.md",
    "docs/evaluation.md",
    "docs/sampling.md",
    "docs/training.md",
    "docs/unet.md",
}
"""Pages that take more than about 5 seconds, most of them since they import diffusers."""


def reason(text: str) -> str | None:
    """How the entry of NOT_RUN begins that a command or script falls under, the longest of several; None: none."""
    found = [begin for begin in NOT_RUN if text == begin or text.startswith((begin + " ", begin + "\n"))]
    return max(found, key=len, default=None)


def added(text: str, line: int) -> list[str]:
    """The flags behind a command."""
    found = [entry.flags.format(line=line) for entry in ADDED if re.search(entry.command, text)]
    return " ".join(found).split()


def cleared(text: str) -> list[str]:
    """The folders that are removed before a command."""
    return [folder for pattern, folder in CLEARED.items() if re.search(pattern, text)]
