"""`python -m benchmarks.ceilings`, see `benchmarks.harness.ceilings`."""

from benchmarks.harness.ceilings import main
from benchmarks.harness.command import run

if __name__ == "__main__":
    run(main)
