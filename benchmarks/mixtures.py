"""`python -m benchmarks.mixtures`, see `benchmarks.studies.mixtures`."""

from benchmarks.harness.command import run
from benchmarks.studies.mixtures import main

if __name__ == "__main__":
    run(main)
