"""`python -m benchmarks.sampling`: latency of one-step samples, as a record.

On each network of `pytest benchmarks/`, at batch 1 and at a large one: one network call in float32, in bf16, compiled,
and on a GPU as a CUDA graph. Everything in turn, round after round, in one run. Nothing is asserted of the times.
"""

import argparse
import shutil
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import record
from benchmarks.cases import Case, cases
from benchmarks.race import figures, synchronize
from benchmarks.recipes import OURS, build
from soflow_fast.one_step import OneStep
from soflow_fast.state import resolve_device

LARGE = {"cuda": 256, "cpu": 64}
WARM = 6
"""Rounds that do not count: compilers and recordings come to rest."""


def contestants(case: Case, batch: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    model, device = case.config.model, resolve_device(case.config.run.device)
    noise = torch.randn(batch, model.in_channels, model.input_size, model.input_size, device=device)
    y = torch.zeros(batch, dtype=torch.int64, device=device)
    ways: dict[str, dict[str, Any]] = {"fp32": {"precision": "fp32"}, "bf16": {"precision": "bf16"}}
    if shutil.which("g++"):
        ways["bf16, compiled"] = {"precision": "bf16", "compile": True}
    if device.type == "cuda":
        ways["bf16, CUDA graph"] = {"precision": "bf16", "cuda_graph": True}
        ways["bf16, compiled, CUDA graph"] = {"precision": "bf16", "compile": True, "cuda_graph": True}
    return {name: partial(OneStep(build(OURS, case.config).flow, **way), noise, y) for name, way in ways.items()}


def measure(case: Case, batch: int, seconds: float) -> list[dict]:
    """A row a way, with the time of every round."""
    steps = contestants(case, batch)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    times: dict[str, list[float]] = {name: [] for name in steps}
    for name in [name for name in steps for _ in range(WARM)]:
        steps[name]()
    began, rounds = time.perf_counter(), 0
    while rounds < 5 or (rounds < 1000 and time.perf_counter() - began < seconds):
        for name, step in steps.items():
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            times[name].append(time.perf_counter() - start)
        rounds += 1
    size = case.describe().rsplit(", batch", 1)[0]
    return [{"case": size, "way": name, "batch": batch, "seconds": values} for name, values in times.items()]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling", description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="about how long to time each size (10)")
    parser.add_argument("--within", type=float, help="begin no size after so many seconds; record those that there are")
    arguments = parser.parse_args()
    began = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for case in cases():
        for batch in (1, LARGE[device]):
            if rows and arguments.within is not None and time.monotonic() - began > arguments.within:
                print(f"time is up: {case.name}, batch {batch} is left out", flush=True)
                continue
            for row in measure(case, batch, arguments.seconds):
                rows.append(row)
                print(f"{row['case']}, batch {batch}: {row['way']}: {figures(row)['median_ms']:.2f} ms", flush=True)
    path = record.write(rows, "python -m benchmarks.sampling", benchmark="sampling")
    print(f"recorded: {record.shown(path)}")


if __name__ == "__main__":
    main()
