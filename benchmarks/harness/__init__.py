"""The machinery of a benchmark: what takes part, on which network, and how it is timed and counted."""
