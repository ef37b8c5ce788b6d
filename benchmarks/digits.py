"""`python -m benchmarks.digits --seeds 0 1 2`: the default training command, timed and judged, as a record.

Each run is the command itself in a process of its own, with a run directory that is thrown away.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import record


def run(seed: int, folder: Path) -> dict:
    """Train the digits with one seed; the seconds of the whole command and the figures that it measured."""
    run_dir = folder / f"seed-{seed}"
    command = [sys.executable, "-m", "soflow_fast.train", "--seed", str(seed), "--run-dir", str(run_dir)]
    began = time.monotonic()
    subprocess.run(command, check=True, cwd=record.ROOT)
    seconds = time.monotonic() - began
    return {"seed": seed, "seconds": seconds, **json.loads((run_dir / "evaluation.json").read_text(encoding="utf-8"))}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.digits", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N")
    seeds = parser.parse_args().seeds
    with tempfile.TemporaryDirectory() as folder:
        rows = [run(seed, Path(folder)) for seed in seeds]
    command = f"python -m benchmarks.digits --seeds {' '.join(map(str, seeds))}"
    print(f"recorded: {record.shown(record.write(rows, command, benchmark='digits'))}")


if __name__ == "__main__":
    main()
