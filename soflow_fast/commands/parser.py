"""Command-line parsing that answers a mistake in one line, with the nearest name."""

import argparse
import difflib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from ..config.schema import SHORT_NAMES, Config, override, shown
from ..config.validation import validate
from ..errors import ConfigError, UserError

T = TypeVar("T")

MOST_CALLS = 1000
"""Network calls per image, of which one to four are what these networks are for."""
MOST_SEED = 2**63 - 1


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors are ConfigError, and which knows the nearest flag to an unknown one."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def flags(self) -> list[str]:
        """Every long flag."""
        return [name for action in self._actions for name in action.option_strings if name.startswith("--")]

    def parse(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse; an unknown flag raises ConfigError with the nearest known one."""
        values, unknown = self.parse_known_args(arguments)
        for action in self._actions:
            value = getattr(values, action.dest, None)
            if isinstance(value, str) and "\0" in value:  # no file's name has one
                name = action.option_strings[0] if action.option_strings else action.metavar
                raise ConfigError(f"{name} {shown(value)}: holds a zero byte")
        if unknown:
            name = unknown[0].split("=")[0]
            close = difflib.get_close_matches(name, self.flags(), 1, 0.5)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ConfigError(f"unknown {'flag' if name.startswith('-') else 'argument'} {name}{hint}")
        return values

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def flag_of(text: str) -> str:
    """An error text that begins with a field's name, with the flag that sets the field instead."""
    for short, full in SHORT_NAMES.items():
        for name in (full, short):
            if text.startswith(name + " "):
                return f"--{short.replace('_', '-')}{text[len(name) :]}"
    return text


def configure(config: Config, changes: dict[str, Any]) -> Config:
    """`config` with `changes` made and checked. Raises ConfigError naming the flag."""
    try:
        return validate(override(config, changes))
    except ValueError as error:
        raise ConfigError(flag_of(str(error))) from None


def whole_number(name: str, text: str, least: int, most: int) -> int:
    """A flag's text as an int from `least` to `most`. Raises ConfigError naming the flag."""
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value <= most:
        raise ConfigError(f"{name} must be a whole number from {least} to {most}, got {shown(text)}")
    return value


def user_value(call: Callable[[], T], name: str) -> T:
    """`call()`, with a ValueError as a ConfigError naming the flag."""
    try:
        return call()
    except UserError:
        raise
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None
