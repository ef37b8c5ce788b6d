"""Command lines by argparse: flags made from the fields of a configuration, and mistakes answered in one line.

argparse, and not a library that makes a whole command line of a dataclass: `error` is a public method here, so that a
mistake is one line with the nearest name, and nothing of it takes time to import.
"""

import argparse
import ast
import inspect
import math
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from itertools import pairwise
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

from ..config import schema
from ..config.schema import RANGE, SHORT_NAMES, SWITCH, TYPES, Config, flatten, nearest, override, shown
from ..config.validation import validate
from ..errors import ConfigError, UserError

T = TypeVar("T")

MOST_CALLS = 1000
"""Network calls per image, of which one to four are what these networks are for."""
MOST_SEED = 2**63 - 1
DEVICES = "auto: every GPU, else the CPU; cpu; cuda:1; cuda:0,cuda:2; ..."
"""Help on the flag --device of commands that work on several."""
GUIDANCE = "scale, of a model trained for a range of them (default: the geometric mean of that)"
"""Help on the flag --guidance of commands that draw."""


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def _split_lines(self, text: str, width: int) -> list[str]:  # as it is inherited, it breaks "sdpa-math" in two
        return textwrap.wrap(text, width, break_on_hyphens=False)


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors are ConfigError, and which knows the nearest flag to an unknown one."""

    def __init__(self, **settings: Any) -> None:
        form = partial(_Formatter, max_help_position=30)
        super().__init__(allow_abbrev=False, formatter_class=form, **settings)

    def flags(self) -> list[str]:
        """Every long flag."""
        return [name for action in self._actions for name in action.option_strings if name.startswith("--")]

    def parse(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse; an unknown flag raises ConfigError with the nearest known one."""
        given = sys.argv[1:] if arguments is None else list(arguments)
        try:
            values, unknown = self.parse_known_args(given)
        except ConfigError:  # a misspelt flag may be why another one is missed
            names = [argument.split("=")[0] for argument in given if argument.startswith("--")]
            self._refuse([name for name in names if name != "--" and name not in self.flags()])
            raise
        for action in self._actions:
            value = getattr(values, action.dest, None)
            if isinstance(value, str) and "\0" in value:  # no file's name has one
                name = action.option_strings[0] if action.option_strings else action.metavar
                raise ConfigError(f"{name} {shown(value)}: holds a zero byte")
        self._refuse(unknown)
        return values

    def _refuse(self, unknown: list[str]) -> None:
        """Raise ConfigError for the first of what is unknown."""
        if unknown:
            name = unknown[0].split("=")[0]
            what = "flag" if name.startswith("-") else "argument"
            raise ConfigError(f"unknown {what} {name}{nearest(name, self.flags())}")

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.replace("ignored explicit argument", "takes no value, got"))


def add_fields(group: Any, names: Iterable[str], presets: Iterable[Config]) -> None:
    """Add a flag for each short name of a field to a group of arguments.

    Its help is the field's docstring, with its choices, and its default where that is the same in all `presets`.
    """
    usual = [flatten(config) for config in presets]
    for name in names:
        field = SHORT_NAMES[name]
        kind, defaults = TYPES[field], {config[field] for config in usual if field in config}
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        notes = [", ".join(choices), f"default {defaults.pop()}" if len(defaults) == 1 and all(defaults) else ""]
        settings: dict[str, Any] = {"metavar": {int: "N", float: "X", str: "NAME", RANGE: "A,B"}.get(kind, "NAME")}
        if kind in (bool, SWITCH):
            settings = {"action": argparse.BooleanOptionalAction}
        note = "; ".join(filter(None, notes))
        text = _help(field) + (f" ({note})" if note else "")
        group.add_argument(f"--{name.replace('_', '-')}", default=None, help=text.replace("%", "%%"), **settings)


def _help(field: str) -> str:
    """The first paragraph of the docstring of a field of the configuration."""
    section, _, name = field.rpartition(".")
    kind = type(getattr(Config(), section)) if section else Config
    return _docstrings()[kind.__name__].get(name, "").partition("\n\n")[0].rstrip(".").replace("\n", " ")


@cache
def _docstrings() -> dict[str, dict[str, str]]:
    """The strings below the fields of each class of the schema, which Python itself does not keep."""
    classes = [node for node in ast.parse(inspect.getsource(schema)).body if isinstance(node, ast.ClassDef)]
    return {node.name: dict(_documented(node.body)) for node in classes}


def _documented(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    for node, below in pairwise(body):
        if isinstance(node, ast.AnnAssign) and isinstance(below, ast.Expr):
            yield ast.unparse(node.target), inspect.cleandoc(ast.literal_eval(below.value))


def flag_of(text: str) -> str:
    """An error text that begins with a field's name, with the flag that sets the field instead."""
    name, _, rest = text.partition(" ")
    for short, full in SHORT_NAMES.items():
        if name in (full, short):
            return f"--{short.replace('_', '-')} {rest}"
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


def number(name: str, text: str | None) -> float | None:
    """A flag's text as a finite number; None: it was not given. Raises ConfigError naming the flag."""
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{name} must be a number, got {shown(text)}")
    return value


def user_value(call: Callable[[], T], name: str) -> T:
    """`call()`, with a ValueError as a ConfigError naming the flag."""
    try:
        return call()
    except UserError:
        raise
    except ValueError as error:
        named = str(error).startswith(f"{name.removeprefix('--')} ")  # after the argument that the flag is
        raise ConfigError(f"--{error}" if named else f"{name}: {error}") from None
