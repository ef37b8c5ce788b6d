"""The time of day, in words."""

import time


def now() -> str:
    """The local time now."""
    return time.strftime("As of %d %B %Y, %H:%M")
