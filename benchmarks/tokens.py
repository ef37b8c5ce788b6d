"""`python -m benchmarks.tokens`, see `benchmarks.studies.tokens`."""

from benchmarks.harness.command import run
from benchmarks.studies.tokens import main

if __name__ == "__main__":
    run(main)
