"""Latents of a VAE in the project's own format, as `python -m soflow_fast.encode` writes them: a folder of maps."""

from .layout import Latents, Layout
from .manifest import Header
from .reader import is_whole, load, recognises
from .writer import Writer

__all__ = ["Header", "Latents", "Layout", "Writer", "is_whole", "load", "recognises"]
