"""`python -m benchmarks.report`, see `benchmarks.report.pages`."""

from benchmarks.harness.command import run
from benchmarks.report.pages import main

if __name__ == "__main__":
    run(main)
