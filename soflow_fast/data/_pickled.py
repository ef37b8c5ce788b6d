"""Pickles of plain values and arrays of bytes, read as the data that they are: nothing that they name is called.

A pickle is a program for a stack machine (the standard library's `pickletools` describes each instruction). This one
knows the instructions that write containers, numbers, texts and bytes, and for numpy's arrays the few calls by which
those are pickled, which it carries out itself; it refuses all others.
"""

import math
import pickletools
from typing import Any

import numpy as np

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
RECONSTRUCT, FROM_BUFFER, ARRAY, DTYPE, ENCODE = "_reconstruct", "_frombuffer", "ndarray", "dtype", "encode"
NAMES = {
    "numpy.core.multiarray _reconstruct": RECONSTRUCT,
    "numpy._core.multiarray _reconstruct": RECONSTRUCT,
    "numpy.core.numeric _frombuffer": FROM_BUFFER,
    "numpy._core.numeric _frombuffer": FROM_BUFFER,
    "numpy ndarray": ARRAY,
    "numpy dtype": DTYPE,
    "_codecs encode": ENCODE,
}
"""What a pickle may name: by these calls numpy's arrays and, in Python 3's files for Python 2, bytes are made."""


class _Name(str):
    """What a pickle may call."""


class _Bytes:
    """The type of uint8."""


class _Array:
    """An array whose content may follow."""

    value: np.ndarray | None = None


def read_pickle(content: bytes) -> dict[str, Any]:
    """The dictionary that a pickle of protocol 2 to 5 holds, its keys as text; arrays are uint8, and views of it.

    Strings of Python 2 are bytes. Raises ValueError for every other content.
    """
    try:
        found = _run(content)
        if not isinstance(found, dict):
            raise ValueError("holds no dictionary")
        return {_text(key): value.value if isinstance(value, _Array) else value for key, value in found.items()}
    except ValueError as error:
        raise ValueError(str(error).partition("\n")[0]) from None
    except Exception as error:  # of a damaged program: an empty stack, a key that is no key, an unknown memory
        raise ValueError(f"is a damaged pickle ({type(error).__name__})") from None


def _text(key: object) -> str:
    if isinstance(key, bytes):
        return key.decode("latin-1")
    if isinstance(key, str):
        return key
    raise ValueError("has keys that are no text")


def _run(content: bytes) -> Any:
    stack: list[Any] = []
    marks: list[int] = []
    memory: dict[int, Any] = {}
    encodable = len(content)  # what was stored once is not written out again and again

    def since_mark() -> list[Any]:
        start = marks.pop()
        taken = stack[start:]
        del stack[start:]
        return taken

    for opcode, arg, _ in pickletools.genops(content):
        name = opcode.name
        if name in VALUES:
            stack.append(arg)
        elif name in ("SHORT_BINSTRING", "BINSTRING"):
            stack.append(_plain(arg, str).encode("latin-1"))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memory[_plain(arg, int)] = stack[-1]
        elif name == "MEMOIZE":
            memory[len(memory)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memory[_plain(arg, int)])
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name == "BYTEARRAY8":
            stack.append(bytes(_plain(arg, bytearray)))
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "EMPTY_TUPLE":
            stack.append(())
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name in TUPLES:
            count = TUPLES[name]
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("APPEND", "APPENDS"):
            items = since_mark() if name == "APPENDS" else [stack.pop()]
            _plain(stack[-1], list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            if len(items) % 2:
                raise ValueError("is a damaged pickle")
            _plain(stack[-1], dict).update(zip(items[::2], items[1::2], strict=True))
        elif name == "GLOBAL":
            stack.append(_named(_plain(arg, str)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_named(f"{module} {attribute}"))
        elif name == "REDUCE":
            args: Any = _plain(stack.pop(), tuple)
            called: Any = _plain(stack.pop(), _Name)
            if called == ENCODE:
                encodable -= len(_plain(args[0], str))
                if encodable < 0:
                    raise ValueError("unpacks to much more than it is")
            stack.append(_called(called, args))
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], _Array):
                _version, shape, kind, by_columns, raw = state
                stack[-1].value = _array(raw, shape, kind, "F" if by_columns else "C")
            elif not isinstance(stack[-1], _Bytes):
                raise ValueError("holds other objects than arrays")
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"is a pickle with the instruction {name}")
    raise ValueError("is a damaged pickle")


def _plain(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError("is a damaged pickle")
    return value


def _named(name: str) -> _Name:
    if name not in NAMES:
        raise ValueError(f"asks for {name.replace(' ', '.')!r}, which is no part of an array")
    return _Name(NAMES[name])


def _called(name: str, args: Any) -> Any:
    """What a call gives that numpy's arrays or bytes are pickled by."""
    if name == ENCODE and len(args) == 2 and args[1] in ("latin1", b"latin1"):
        return args[0].encode("latin-1")
    if name == DTYPE and args and args[0] in ("u1", b"u1", "B", b"B", "|u1"):
        return _Bytes()
    if name == DTYPE:
        raise ValueError(f"holds an array of other numbers than uint8 ({str(args[:1])[1:20]})")
    made = _Array()
    if name == FROM_BUFFER:
        raw, kind, shape, order = args
        made.value = _array(raw, shape, kind, order)
    elif name != RECONSTRUCT or args[0] != ARRAY:
        raise ValueError(f"calls {name} with other values than an array needs")
    return made


def _array(raw: Any, shape: object, kind: object, order: Any) -> np.ndarray:
    """uint8 of a shape, a view of its bytes."""
    if not isinstance(kind, _Bytes):
        raise ValueError("holds an array of other numbers than uint8")
    sides = _plain(shape, tuple)
    if not all(isinstance(side, int) and side >= 0 for side in sides) or len(sides) > 8:
        raise ValueError("is a damaged pickle")
    raw = _plain(raw, bytes)
    if math.prod(sides) != len(raw):
        raise ValueError(f"holds an array of shape {str(sides)[:40]} with {len(raw)} bytes")
    return np.frombuffer(raw, np.uint8).reshape(sides, order="F" if order == "F" else "C")
