"""`python -m benchmarks.cpu`, see `benchmarks.studies.cpu`."""

from benchmarks.harness.command import run
from benchmarks.studies.cpu import main

if __name__ == "__main__":
    run(main)
