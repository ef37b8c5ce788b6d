"""`python -m benchmarks.book`, see `benchmarks.studies.book`."""

from benchmarks.harness.command import run
from benchmarks.studies.book import main

if __name__ == "__main__":
    run(main)
