"""A folder of drawn images: made by one command, gone on with by the same command, and refused to any other."""

from .filling import fill
from .folder import Folder, taken
from .settings import MANIFEST, Settings

__all__ = ["MANIFEST", "Folder", "Settings", "fill", "taken"]
