"""Runs the blocks of pages, each page in a fork of this process: `python -m tests.blocks.runner`.

A line of standard input names a file with the steps of a page; they run in its folder, and the line that is printed is
their exit code. What they print is in `output` there. A fork saves each page the imports, which take most of the time.

A step is code in Python, all of it in one namespace, or a command of this repository's, which is called with its
arguments. The first that fails ends the page with its place.
"""

import importlib
import json
import os
import re
import runpy
import shutil
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

import soflow_fast.evaluation
import soflow_fast.runs.trainer  # noqa: F401  # most commands import it
from soflow_fast.commands import process
from tests.blocks import outcome
from tests.blocks.prepared import prepare

WITH_DIFFUSERS = r"photos|runs/imagenet\b|THEIR_DIR|-unet|diffusers"
"""What the blocks name that import it, which takes eight seconds."""

WARNED = (
    r"`torch\.jit\.script",  # raised inside torch by forward-mode differentiation
    "`torch_dtype` is deprecated",  # later diffusers say `dtype`, which earlier ones do not know
)
"""Warnings of others that pages cannot avoid."""

MOST_SECONDS = 600
"""Of a page; one that hangs ends with it."""


def main() -> None:
    for line in sys.stdin:
        file = Path(line.strip())
        steps = json.loads(file.read_text())
        if re.search(WITH_DIFFUSERS, str(steps)):
            importlib.import_module("diffusers").AutoencoderKL  # noqa: B018  # loads on first use
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = run_in(file.parent, steps)
            finally:
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def run_in(home: Path, steps: list[dict[str, Any]]) -> int:
    """Run the steps in a folder. Returns the exit code."""
    signal.alarm(MOST_SECONDS)
    output = os.open(home / "output", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(home)
    os.environ["XDG_CACHE_HOME"] = str(home / "cache")
    prepare(home, "".join(step.get("python", step.get("shown", "")) + "\n" for step in steps))
    torch.manual_seed(0)
    space: dict[str, Any] = {"__name__": "page"}
    failed = ""
    for step in steps:
        print(f"--- {step['where']}", flush=True)
        for folder in step.get("cleared", ()):
            shutil.rmtree(folder, ignore_errors=True)
        try:
            take(step, space)
        except Exception:
            traceback.print_exc()
            failed = step["where"]
            print(f"failed: {failed}", file=sys.stderr)
            break
    sys.stdout.flush()
    sys.stderr.flush()
    return int(bool(failed))


def take(step: dict[str, Any], space: dict[str, Any]) -> None:
    """Run one step."""
    if "python" in step:
        warnings.simplefilter("error")  # as in all tests; commands, which call others, are left as they are
        for message in WARNED:
            warnings.filterwarnings("ignore", message)
        exec(compile("\n" * (step["line"] - 1) + step["python"], step["where"], "exec"), space)
    elif "check" in step:
        outcome.CHECKS[step["check"]](space)
    else:
        code = call(step["words"])
        assert code == 0, f"exit code {code} of {' '.join(step['words'])}"


def call(words: list[str]) -> int:
    """The exit code of `python -m MODULE ...` or `python FILE ...`, called in this process."""
    python, *rest = words
    assert python == "python", (
        f"{python} is no command that is run; those that are not are listed in tests/blocks/changes.py"
    )
    try:
        if rest[0] == "-m" and rest[1].startswith("soflow_fast."):
            module = importlib.import_module(rest[1])
            process.run(lambda: module.main(rest[2:]))
        elif rest[0] == "-m":
            sys.argv = rest[1:]
            runpy.run_module(rest[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [str(outcome.ROOT / rest[0]), *rest[1:]]
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0


if __name__ == "__main__":
    main()
