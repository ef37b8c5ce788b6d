"""`python -m benchmarks.step`, see `benchmarks.studies.step`."""

from benchmarks.harness.command import run
from benchmarks.studies.step import main

if __name__ == "__main__":
    run(main)
