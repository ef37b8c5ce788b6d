"""`python -m benchmarks.derivative`, see `benchmarks.studies.derivative`."""

from benchmarks.harness.command import run
from benchmarks.studies.derivative import main

if __name__ == "__main__":
    run(main)
