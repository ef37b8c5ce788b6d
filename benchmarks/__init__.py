"""Benchmarks: `pytest benchmarks/`, with `--record` to keep the figures, then `python -m benchmarks.report`."""
