"""`python -m benchmarks.discrete`, see `benchmarks.studies.discrete`."""

from benchmarks.harness.command import run
from benchmarks.studies.discrete import main

if __name__ == "__main__":
    run(main)
