"""`python -m benchmarks.timeline`: where the time of a step goes on a GPU, kernel by kernel.

Each recipe is timed alone, then two of its steps are traced by torch's profiler. Nothing is checked here: the races of
`benchmarks.step` are for that, and this is for whoever wants to know why one of them comes out as it does.
"""

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import command
from benchmarks.harness.cases import public
from benchmarks.harness.contestants import CONTESTANTS, FIRST
from benchmarks.harness.race import chosen
from benchmarks.harness.recipes import build
from benchmarks.harness.timing import Stopwatch, release
from benchmarks.report import record
from soflow_fast.errors import UserError

TIMED, TRACED = 8, 2
"""Steps."""
KEPT = 40
"""Kernels of a row, those that take longest."""
KINDS = ("products", "attention", "ours", "Inductor's", "torch's other")


def kind(kernel: str) -> str:
    """The kind of a kernel by its name: who makes it, and for what."""
    if any(word in kernel for word in ("nvjet", "gemm", "cutlass", "cublas")):
        return "products"
    if any(word in kernel for word in ("sdpa", "flash", "fmha", "cudnn")):
        return "attention"
    if kernel.startswith("triton_"):
        return "Inductor's"
    return "ours" if kernel.startswith("_") else "torch's other"


def traced(step: Callable[[], object]) -> list[dict]:
    """The kernels of a step by name and grid, the longest first: launches and ms in one step."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        for _ in range(TRACED):
            step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found.export_chrome_trace(str(path))
        return by_kernel(json.loads(path.read_text())["traceEvents"], TRACED)


def by_kernel(events: list[dict], steps: int) -> list[dict]:
    """Kernels of a trace of so many steps, those of one name and grid together."""
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "kernel":
            groups[event["name"], str(event["args"].get("grid", ""))].append(event["dur"])
    rows = [
        {"kernel": name, "grid": grid, "launches": len(times) / steps, "ms": sum(times) / steps / 1e3}
        for (name, grid), times in groups.items()
    ]
    return sorted(rows, key=lambda row: -row["ms"])


def totals(kernels: list[dict]) -> dict[str, float]:
    """Milliseconds of each kind."""
    found: dict[str, float] = {name: 0.0 for name in KINDS}
    for row in kernels:
        found[kind(row["kernel"])] += row["ms"]
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Raises UserError without a GPU, and for a recipe that there is not."""
    parser = command.Parser(prog="python -m benchmarks.timeline", description=__doc__)
    parser.add_argument("--size", default="XL/2", help="of the public networks (XL/2)")
    parser.add_argument("--batch", type=int, default=256, help="images (256)")
    about = "by their names in a record of the step; by default ours, ours as train runs it and the authors' compiled"
    parser.add_argument("--recipes", nargs="+", metavar="NAME", default=[recipe.name for recipe in FIRST], help=about)
    arguments = parser.parse(argv)
    recipes = {recipe.name: recipe for recipe in CONTESTANTS}
    for name in arguments.recipes:
        if name not in recipes:
            raise UserError(f"--recipes {name}: there is none of that name; there are {', '.join(recipes)}")
    if not torch.cuda.is_available():
        raise UserError("benchmarks.timeline: needs a GPU")
    case, kept, rows = public(arguments.size, arguments.batch), record.Growing("timeline", argv), []
    for name in arguments.recipes:
        recipe = recipes[name]
        if reason := recipe.why_not(case.config):
            print(f"{name}: not timed: {reason}", flush=True)
            continue
        state = build(recipe, case.config)
        step = partial(recipe.step, state, *case.batch(state.device))
        for _ in range(max(3, recipe.checked_steps + 1)):
            step()
        watch = Stopwatch(state.device)
        row = {"case": case.describe(), "recipe": name, "batch": arguments.batch, "chosen": chosen(recipe, state)}
        row |= {"seconds": [watch.seconds(step) for _ in range(TIMED)]}
        kernels = traced(step)
        row |= {"launches": sum(each["launches"] for each in kernels), "totals": totals(kernels)}
        rows.append(row | {"kernels": kernels[:KEPT]})
        print(f"{name}: {row['totals']}", flush=True)
        kept.keep(rows)
        del state, step
        release()
    if not rows:
        raise UserError("benchmarks.timeline: none of these recipes runs here")
    kept.finish(rows)
