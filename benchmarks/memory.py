"""`python -m benchmarks.memory`, see `benchmarks.studies.memory`."""

from benchmarks.harness.command import run
from benchmarks.studies.memory import main

if __name__ == "__main__":
    run(main)
