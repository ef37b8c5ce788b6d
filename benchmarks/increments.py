"""`python -m benchmarks.increments`, see `benchmarks.studies.increments`."""

from benchmarks.harness.command import run
from benchmarks.studies.increments import main

if __name__ == "__main__":
    run(main)
