"""`python -m benchmarks.guidance`, see `benchmarks.studies.guidance`."""

from benchmarks.harness.command import run
from benchmarks.studies.guidance import main

if __name__ == "__main__":
    run(main)
