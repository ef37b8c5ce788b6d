"""`python -m benchmarks.host_time`, see `benchmarks.studies.host_time`."""

from benchmarks.harness.command import run
from benchmarks.studies.host_time import main

if __name__ == "__main__":
    run(main)
