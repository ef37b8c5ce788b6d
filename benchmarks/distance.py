"""`python -m benchmarks.distance`, see `benchmarks.studies.distance`."""

from benchmarks.harness.command import run
from benchmarks.studies.distance import main

if __name__ == "__main__":
    run(main)
