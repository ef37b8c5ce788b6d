"""`python -m benchmarks.guidance`: one network for a range of guidance scales beside one network for each of them.

Each is the digits' training command in a process of its own, with a run directory that is thrown away, and then the
command that evaluates it, at every scale that it was trained for.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import command
from benchmarks.report import record
from soflow_fast.errors import UserError

LOW, HIGH = 1, 4
SCALES = (1, 2, 4)
RANGE = f"{LOW} to {HIGH}"
SAMPLES = 4000


def trainings() -> dict[str, tuple[list[str], tuple[int, ...]]]:
    """What each network is trained for: the flags of its training, and the scales that it is judged at."""
    found: dict[str, tuple[list[str], tuple[int, ...]]] = {RANGE: (["--guidance-range", f"{LOW},{HIGH}"], SCALES)}
    return found | {f"{w}": (["--set", f"objective.guidance_scale={w}"], (w,)) for w in SCALES}


def run(trained: str, seed: int, steps: int, folder: Path) -> list[dict]:
    """Train the digits and judge their samples of one network call; a row for each scale.

    Raises UserError if a command fails, for reasons that it has said itself.
    """
    flags, scales = trainings()[trained]
    run_dir = folder / f"{trained} {seed}"
    _command("train", "--seed", str(seed), "--steps", str(steps), "--run-dir", str(run_dir), *flags)
    rows = []
    for w in scales:
        chosen = ["--guidance", str(w)] if trained == RANGE else []
        text = _command("evaluate", str(run_dir), "--n", str(SAMPLES), "--nfe", "1", "--json", *chosen)
        scores = json.loads(text.splitlines()[-1])["nfe"]["1"]
        rows.append({"trained": trained, "guidance": w, "seed": seed, "steps": steps, "samples": SAMPLES, **scores})
    return rows


def _command(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", f"soflow_fast.{name}", *arguments], cwd=record.ROOT, stdout=subprocess.PIPE, text=True
    )
    if done.returncode != 0:
        raise UserError(f"{name} {' '.join(arguments)}: ended with exit code {done.returncode}")
    return done.stdout


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = command.Parser(prog="python -m benchmarks.guidance", description=__doc__)
    parser.add_argument("--seeds", type=command.seed, nargs="+", default=[0], metavar="N")
    parser.add_argument("--steps", type=command.count, default=3000, metavar="N", help="of each training (3000)")
    values = parser.parse(argv)
    command.distinct("--seeds", values.seeds)
    kept, rows = record.Growing("guidance", argv), []
    with tempfile.TemporaryDirectory() as folder:
        for seed in values.seeds:
            for trained in trainings():
                rows += run(trained, seed, values.steps, Path(folder))
                kept.keep(rows)
    kept.finish(rows)
