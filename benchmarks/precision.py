"""`python -m benchmarks.precision`, see `benchmarks.studies.precision`."""

from benchmarks.harness.command import run
from benchmarks.studies.precision import main

if __name__ == "__main__":
    run(main)
