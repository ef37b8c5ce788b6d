"""`python -m benchmarks.scaling`, see `benchmarks.studies.scaling`."""

from benchmarks.harness.command import run
from benchmarks.studies.scaling import main

if __name__ == "__main__":
    run(main)
