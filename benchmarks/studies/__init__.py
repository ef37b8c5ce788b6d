"""Measurements that are commands of their own: `python -m benchmarks.<name>`; each leaves a record."""
