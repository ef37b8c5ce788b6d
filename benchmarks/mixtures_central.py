"""`python -m benchmarks.mixtures_central`, see `benchmarks.studies.mixtures_central`."""

from benchmarks.harness.command import run
from benchmarks.studies.mixtures_central import main

if __name__ == "__main__":
    run(main)
