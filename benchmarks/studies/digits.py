"""`python -m benchmarks.digits --seeds 0 1 2`: the default training command, timed and judged, as a record.

Each run is the command itself in a process of its own, with a run directory that is thrown away.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import command
from benchmarks.report import record
from soflow_fast.errors import UserError


def run(seed: int, folder: Path) -> dict:
    """Train the digits with one seed; the seconds of the whole command and the figures that it measured.

    Raises UserError if it fails, for reasons that it has said itself.
    """
    run_dir = folder / f"seed-{seed}"
    training = [sys.executable, "-m", "soflow_fast.train", "--seed", str(seed), "--run-dir", str(run_dir)]
    began = time.monotonic()
    code = subprocess.run(training, cwd=record.ROOT).returncode
    if code != 0:
        raise UserError(f"--seeds {seed}: the training ended with exit code {code}")
    seconds = time.monotonic() - began
    return {"seed": seed, "seconds": seconds, **json.loads((run_dir / "evaluation.json").read_text(encoding="utf-8"))}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = command.Parser(prog="python -m benchmarks.digits", description=__doc__)
    parser.add_argument("--seeds", type=command.seed, nargs="+", default=[0], metavar="N")
    seeds = parser.parse(argv).seeds
    command.distinct("--seeds", seeds)
    kept, rows = record.Growing("digits", argv), []
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            rows.append(run(seed, Path(folder)))
            kept.keep(rows)
    kept.finish(rows)
