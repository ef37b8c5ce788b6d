"""Data sets: `open_source(config)` gives one; `batch(step, rank, world)` of it is a pure function of its arguments."""

from .source import Source, open_source

__all__ = ["Source", "open_source"]
