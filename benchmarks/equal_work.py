"""`python -m benchmarks.equal_work`, see `benchmarks.studies.equal_work`."""

from benchmarks.harness.command import run
from benchmarks.studies.equal_work import main

if __name__ == "__main__":
    run(main)
