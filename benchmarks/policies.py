"""`python -m benchmarks.policies`, see `benchmarks.studies.policies`."""

from benchmarks.harness.command import run
from benchmarks.studies.policies import main

if __name__ == "__main__":
    run(main)
