"""`python -m benchmarks.prediction`, see `benchmarks.studies.prediction`."""

from benchmarks.harness.command import run
from benchmarks.studies.prediction import main

if __name__ == "__main__":
    run(main)
