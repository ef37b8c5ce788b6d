"""`python -m benchmarks.reading`, see `benchmarks.studies.reading`."""

from benchmarks.harness.command import run
from benchmarks.studies.reading import main

if __name__ == "__main__":
    run(main)
