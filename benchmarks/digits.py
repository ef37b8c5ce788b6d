"""`python -m benchmarks.digits`, see `benchmarks.studies.digits`."""

from benchmarks.harness.command import run
from benchmarks.studies.digits import main

if __name__ == "__main__":
    run(main)
