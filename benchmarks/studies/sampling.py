"""`python -m benchmarks.sampling`: latency of one-step samples, as a record.

On each network of `pytest benchmarks/`, at batch 1 and at a large one: one network call in float32, in bf16, compiled,
and on a GPU as a CUDA graph. Everything in turn, round after round, in one run. Nothing is asserted of the times.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.harness import command
from benchmarks.harness.cases import Case, cases
from benchmarks.harness.race import figures
from benchmarks.harness.recipes import OURS, build
from benchmarks.harness.timing import InTurn, release
from benchmarks.report import record
from soflow_fast.sampling import OneStep
from soflow_fast.training.precision import resolve_device

LARGE = {"cuda": 256, "cpu": 64}
WARM = 6
"""Calls before the first round, in which compilers and recordings come to rest."""


def contestants(case: Case, batch: int) -> dict[str, Callable[[], Callable[[], object]]]:
    """The ways by name, each a call that makes one and returns the call that is timed."""
    model, device = case.config.model, resolve_device(case.config.run.device)
    noise = torch.randn(batch, *model.sample_shape, device=device)
    y = torch.zeros(batch, dtype=torch.int64, device=device)
    ways: dict[str, dict[str, Any]] = {"fp32": {"precision": "fp32"}, "bf16": {"precision": "bf16"}}
    if shutil.which("g++"):
        ways["bf16, compiled"] = {"precision": "bf16", "compile": True}
    if device.type == "cuda":
        ways["bf16, CUDA graph"] = {"precision": "bf16", "cuda_graph": True}
        ways["bf16, compiled, CUDA graph"] = {"precision": "bf16", "compile": True, "cuda_graph": True}

    def make(way: dict[str, Any]) -> Callable[[], object]:
        return partial(OneStep(build(OURS, case.config).flow, **way), noise, y)

    return {name: partial(make, way) for name, way in ways.items()}


def measure(case: Case, batch: int, seconds: float) -> list[dict]:
    """A row a way, with the time of every round; one that runs out of memory says so, and the others go on."""
    timer = InTurn(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    size = case.describe().rsplit(", batch", 1)[0]
    rows: dict[str, dict] = {}
    for name, make in contestants(case, batch).items():
        rows[name] = {"case": size, "way": name, "batch": batch, "why_not": None, "seconds": []}
        try:
            timer.add(name, _warm(make), rows[name]["seconds"])
        except torch.OutOfMemoryError:
            rows[name]["why_not"] = "out of memory"
        if name not in timer.calls:
            release()
    for name in timer.run(seconds, least=5, most=1000):
        rows[name]["why_not"] = "out of memory beside the others"
    return list(rows.values())


def _warm(make: Callable[[], Callable[[], object]]) -> Callable[[], object]:
    step = make()
    for _ in range(WARM):
        step()
    return step


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = command.Parser(prog="python -m benchmarks.sampling", description=__doc__)
    about = "about how long to time each size (10)"
    parser.add_argument("--seconds", type=command.seconds, default=10.0, help=about)
    about = "begin no size after so many seconds; record those that there are"
    parser.add_argument("--within", type=command.seconds, help=about)
    arguments = parser.parse(argv)
    kept, began = record.Growing("sampling", argv), time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[dict] = []
    todo = [(case, batch) for case in cases() for batch in (1, LARGE[device])]
    missing = [f"{case.name}, batch {batch}" for case, batch in todo]
    for case, batch in todo:
        if rows and arguments.within is not None and time.monotonic() - began > arguments.within:
            print(f"time is up: left out: {'; '.join(missing)}", flush=True)
            break
        for row in measure(case, batch, arguments.seconds):
            rows.append(row)
            figure = row["why_not"] or f"{figures(row)['median_ms']:.2f} ms"
            print(f"{row['case']}, batch {batch}: {row['way']}: {figure}", flush=True)
        missing.pop(0)
        kept.keep(rows, missing)
    kept.finish(rows, missing)
