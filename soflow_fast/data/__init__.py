"""Data sets: `open_source(config)` gives one; `batch(step, rank, world)` of it is a pure function of its arguments."""

from .dataset import Contents, Dataset
from .memory import InMemory
from .source import Source, fitted, open_source

__all__ = ["Contents", "Dataset", "InMemory", "Source", "fitted", "open_source"]
