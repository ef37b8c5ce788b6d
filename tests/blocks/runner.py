"""Runs the steps of a page in a process of its own: `python -m tests.blocks.runner STEPS.json`, where it is to happen.

A step is code in Python, all of it in one namespace, or a command of this repository's, which is called with its
arguments. The first that fails ends the process with its place on the page.
"""

import importlib
import json
import runpy
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from soflow_fast.commands import process
from tests.blocks import outcome
from tests.blocks.prepared import prepare


def main() -> None:
    steps = json.loads(Path(sys.argv[1]).read_text())
    prepare(Path.cwd(), "".join(step.get("python", step.get("shown", "")) + "\n" for step in steps))
    torch.manual_seed(0)
    space: dict[str, Any] = {"__name__": "page"}
    for step in steps:
        print(f"--- {step['where']}", flush=True)
        for folder in step.get("cleared", ()):
            shutil.rmtree(folder, ignore_errors=True)
        try:
            if "python" in step:
                exec(compile("\n" * (step["line"] - 1) + step["python"], step["where"], "exec"), space)
            elif "check" in step:
                outcome.CHECKS[step["check"]](space)
            else:
                code = call(step["words"])
                assert code == 0, f"exit code {code} of {' '.join(step['words'])}"
        except Exception:
            traceback.print_exc()
            sys.exit(f"failed: {step['where']}")


def call(words: list[str]) -> int:
    """The exit code of `python -m MODULE ...` or `python FILE ...`, called in this process."""
    python, *rest = words
    assert python == "python", f"{python} is none of the commands that are run; tests/blocks/changes.py lists the others"
    try:
        if rest[0] == "-m" and rest[1].startswith("soflow_fast."):
            module = importlib.import_module(rest[1])
            process.run(lambda: module.main(rest[2:]))
        elif rest[0] == "-m":
            sys.argv = rest[1:]
            runpy.run_module(rest[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [str(Path(outcome.ROOT) / rest[0]), *rest[1:]]
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0


if __name__ == "__main__":
    main()
