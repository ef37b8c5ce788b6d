"""`python -m benchmarks.sampling`, see `benchmarks.studies.sampling`."""

from benchmarks.harness.command import run
from benchmarks.studies.sampling import main

if __name__ == "__main__":
    run(main)
