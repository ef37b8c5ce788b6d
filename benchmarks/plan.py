"""`python -m benchmarks.plan`, see `benchmarks.studies.plan`."""

from benchmarks.harness.command import run
from benchmarks.studies.plan import main

if __name__ == "__main__":
    run(main)
