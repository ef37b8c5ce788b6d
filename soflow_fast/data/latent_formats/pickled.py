"""What is in a pickle of numbers, texts, lists, dicts and numpy arrays, found out without running it.

A pickle is a program that may call anything. Here its instructions (PEP 307, PEP 3154, PEP 574) only build a
description: a name that is to be imported becomes `Name`, a call becomes `Call`, and neither is carried out. `array`
then makes an array of the description that numpy gives of one.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

MOST = 10_000
"""Instructions that are followed."""


class Name(NamedTuple):
    """What would be imported."""

    module: str
    name: str


@dataclass
class Call:
    """What would be called."""

    function: Any
    arguments: Any
    state: Any = None
    """What would be put into the result."""
    of_class: bool = False
    """Whether it makes an object of a class without calling anything else, by `__new__`."""


class Stored(NamedTuple):
    """What lies beside the pickle, by what the program that wrote it calls it."""

    key: Any


NUMBERS: dict[int, str] = {ord("J"): "<i", ord("K"): "<B", ord("M"): "<H", ord("G"): ">d"}
TEXTS = {0x8C: 1, ord("X"): 4, 0x8D: 8}
"""Instructions of a text, with the bytes of its length."""
BYTES = {ord("C"): 1, ord("B"): 4, 0x8E: 8, 0x96: 8}
CONSTANTS: dict[int, Callable[[], Any]] = {
    ord("N"): lambda: None,
    0x88: lambda: True,
    0x89: lambda: False,
    ord(")"): tuple,
    ord("]"): list,
    ord("}"): dict,
}
TUPLES = {0x85: 1, 0x86: 2, 0x87: 3}
DICTS = (Name("collections", "OrderedDict"), Name("collections", "defaultdict"), Name("collections", "Counter"))
"""Kinds of dict that are read as dicts."""


def described(content: bytes | memoryview, most: int = MOST) -> Any:
    """What a pickle of at most `most` instructions holds.

    Raises ValueError for one that is damaged, or uses what is not needed for numbers.
    """
    try:
        return _Reader(memoryview(content)).result(most)
    except (IndexError, struct.error, TypeError, KeyError, UnicodeDecodeError, AttributeError, RecursionError):
        raise ValueError("is a damaged pickle") from None


class _Reader:
    def __init__(self, content: memoryview) -> None:
        self._content, self._at = content, 0
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def result(self, most: int) -> Any:
        for _ in range(most):
            code = self._take(1)[0]
            if code == ord("."):
                return self._stack.pop()
            self._follow(code)
        raise ValueError("is a pickle with too many parts")

    def _take(self, length: int) -> memoryview:
        part = self._content[self._at : self._at + length]
        if len(part) < length:
            raise IndexError
        self._at += length
        return part

    def _size(self, width: int) -> int:
        return int.from_bytes(self._take(width), "little")

    def _line(self) -> str:
        rest = bytes(self._content[self._at : self._at + 256])
        line = rest[: rest.index(b"\n")] if b"\n" in rest else b""
        self._at += len(line) + 1
        return line.decode()

    def _since_mark(self) -> list[Any]:
        at = self._marks.pop()
        values = self._stack[at:]
        del self._stack[at:]
        return values

    def _follow(self, code: int) -> None:
        stack = self._stack
        if code in NUMBERS:
            stack.append(struct.unpack(NUMBERS[code], self._take(struct.calcsize(NUMBERS[code])))[0])
        elif code in TEXTS:
            stack.append(str(self._take(self._size(TEXTS[code])), "utf-8"))
        elif code in BYTES:
            stack.append(self._take(self._size(BYTES[code])))
        elif code in CONSTANTS:
            stack.append(CONSTANTS[code]())
        elif code in TUPLES:
            values = stack[len(stack) - TUPLES[code] :]
            del stack[len(stack) - TUPLES[code] :]
            stack.append(tuple(values))
        elif code == 0x8A:  # an integer of any length
            stack.append(int.from_bytes(self._take(self._size(1)), "little", signed=True))
        elif code == 0x80:  # the version
            self._take(1)
        elif code == 0x95:  # a frame, which is for readers of streams
            self._take(8)
        elif code == ord("("):
            self._marks.append(len(stack))
        elif code == ord("t"):
            stack.append(tuple(self._since_mark()))
        elif code in b"qr\x94":
            key = len(self._memo) if code == 0x94 else self._size(1 if code == ord("q") else 4)
            self._memo[key] = stack[-1]
        elif code in b"hj":
            stack.append(self._memo[self._size(1 if code == ord("h") else 4)])
        elif code in b"ae":
            values = self._since_mark() if code == ord("e") else [stack.pop()]
            _is(stack[-1], list).extend(values)
        elif code in b"su":
            values = self._since_mark() if code == ord("u") else [stack.pop(-2), stack.pop()]
            _is(stack[-1], dict).update(zip(values[::2], values[1::2], strict=True))
        elif code == ord("c"):
            stack.append(Name(self._line(), self._line()))
        elif code == 0x93:
            name, module = stack.pop(), stack.pop()
            stack.append(Name(_is(module, str), _is(name, str)))
        elif code == ord("R"):
            arguments, function = stack.pop(), stack.pop()
            stack.append(_known(Call(function, arguments)))
        elif code == 0x81:
            arguments, function = stack.pop(), stack.pop()
            stack.append(Call(function, arguments, of_class=True))
        elif code == ord("Q"):
            stack.append(Stored(stack.pop()))
        elif code == ord("b"):
            state = stack.pop()
            if not isinstance(stack[-1], dict):  # attributes of a kind of dict are no content
                _is(stack[-1], Call).state = state
        else:
            raise ValueError(f"is a pickle with the instruction {code:#04x}, which numbers do not need")


def _known(call: Call) -> Any:
    """What a call stands for: bytes in version 2, which has no instruction for them, or a kind of dict; else itself."""
    function, arguments = call.function, _is(call.arguments, tuple)
    if function == Name("__builtin__", "bytes") and not arguments:
        return b""
    if function == Name("_codecs", "encode") and len(arguments) == 2 and arguments[1] == "latin1":
        return _is(arguments[0], str).encode("latin1")
    if function in DICTS:
        given = arguments[-1] if arguments else None
        return dict(given) if isinstance(given, dict | list) else {}
    return call


def _is(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError
    return value


def array(value: Any) -> np.ndarray:
    """The array, or numpy's number as one of shape (), that a description is of. Raises ValueError for another."""
    try:
        call = _is(value, Call)
        name = call.function.name if call.function.module.partition(".")[0] == "numpy" else ""
        if name == "_reconstruct":
            _, shape, dtype, fortran, content = call.state
        elif name == "_frombuffer":
            content, dtype, shape, order = call.arguments
            fortran = order == "F"
        elif name == "scalar":
            (dtype, content), shape, fortran = call.arguments, (), False
        else:
            raise TypeError
        kind = _dtype(dtype)
        if not all(type(size) is int and size >= 0 for size in shape) or math.prod(shape) * kind.itemsize != len(
            content
        ):
            raise TypeError
        return np.frombuffer(content, kind).reshape(shape, order="F" if fortran else "C")
    except (TypeError, ValueError, AttributeError, KeyError, IndexError):
        raise ValueError(f"holds {str(value)[:60]!r}, which is no array of numbers") from None


def _dtype(value: Any) -> np.dtype:
    code, order = _is(value, Call).arguments[0], value.state[1]
    if value.function != Name("numpy", "dtype") or code not in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2"):
        raise TypeError
    return np.dtype({"<": "<", ">": ">", "|": "|"}[order] + code)
