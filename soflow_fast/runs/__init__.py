"""A whole run: the loop, its directory, checkpoints, logs."""
