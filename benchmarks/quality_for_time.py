"""`python -m benchmarks.quality_for_time`, see `benchmarks.studies.quality_for_time`."""

from benchmarks.harness.command import run
from benchmarks.studies.quality_for_time import main

if __name__ == "__main__":
    run(main)
