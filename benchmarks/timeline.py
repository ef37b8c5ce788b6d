"""`python -m benchmarks.timeline`, see `benchmarks.studies.timeline`."""

from benchmarks.harness.command import run
from benchmarks.studies.timeline import main

if __name__ == "__main__":
    run(main)
