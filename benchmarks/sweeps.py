"""`python -m benchmarks.sweeps`, see `benchmarks.studies.sweeps`."""

from benchmarks.harness.command import run
from benchmarks.studies.sweeps import main

if __name__ == "__main__":
    run(main)
