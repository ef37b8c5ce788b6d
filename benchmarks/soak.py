"""`python -m benchmarks.soak`, see `benchmarks.studies.soak`."""

from benchmarks.harness.command import run
from benchmarks.studies.soak import main

if __name__ == "__main__":
    run(main)
