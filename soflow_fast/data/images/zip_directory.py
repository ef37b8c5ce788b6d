"""A zip's directory, entry by entry: `zipfile` holds all of it, in 1 kB or more for each member."""

import os
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple
from zipfile import BadZipFile

END = struct.Struct("<4s8xLLH")
"""Signature, bytes and offset of the directory, bytes of the comment after it."""
END64 = struct.Struct("<4s36xQQ")
"""Signature, bytes and offset of the directory."""
LOCATOR = 20
"""Bytes between the end of a directory in 64 bits and that in 32, which begin with PK 6 7."""
ENTRY = struct.Struct("<4s4xHH4xLLLHHH8xL")
"""Signature, flags, method, sum, bytes packed and unpacked, lengths of name, extras and comment, offset."""
PIECE = 2**20
LARGE = 2**32 - 1
"""Stands for a number that is in the extras, in 64 bits."""
UTF8 = 0x800
"""The flag of a name in UTF-8."""
NUMBERS, NAME = 1, 0x7075
"""Kinds of extras: numbers in 64 bits, and Info-ZIP's name in UTF-8."""


class Member(NamedTuple):
    """All that is kept of a zip's member beside its name."""

    offset: int
    """Where its header lies."""
    packed: int
    """Bytes in the zip."""
    size: int
    crc: int
    method: int
    flags: int
    name: int
    """The sum of its name's bytes."""


def exactly(handle: int, length: int, offset: int) -> bytes:
    """So many bytes of a file. Raises BadZipFile where it has fewer, and OSError."""
    content = os.pread(handle, length, offset)
    if len(content) != length:
        raise BadZipFile("it is cut off")
    return content


def members(handle: int, length: int) -> Iterator[tuple[str, Member]]:
    """The members of an open zip that has so many bytes, in its order. Raises BadZipFile, UnicodeError and OSError."""
    start, end, before = _directory(handle, length)
    read, content, at = start, b"", 0
    while read - len(content) + at < end:
        if len(content) - at < ENTRY.size + 3 * 2**16 and read < end:  # the longest entry
            piece = exactly(handle, min(PIECE, end - read), read)
            read, content, at = read + len(piece), content[at:] + piece, 0
        if len(content) - at < ENTRY.size:
            raise BadZipFile("its directory is cut off")
        signature, flags, method, crc, packed, size, *lengths, offset = ENTRY.unpack_from(content, at)
        stop = at + ENTRY.size + sum(lengths)
        if signature != b"PK\1\2" or stop > len(content):
            raise BadZipFile("its directory is damaged")
        name = content[at + ENTRY.size : at + ENTRY.size + lengths[0]]
        extras = content[at + ENTRY.size + lengths[0] : stop - lengths[2]]
        size, packed, offset = _in_64_bits(extras, size, packed, offset)
        # What follows a zero is no part of a name, as other programs take it.
        text = _text(name, extras, bool(flags & UTF8)).partition("\0")[0]
        yield text, Member(offset + before, packed, size, crc, method, flags, zlib.crc32(name))
        at = stop


def _directory(handle: int, length: int) -> tuple[int, int, int]:
    """Where the directory begins and ends, and the bytes before the zip."""
    most = END.size + 2**16 + LOCATOR + END64.size
    tail = exactly(handle, min(length, most), max(0, length - most))
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < END.size:
        raise BadZipFile("it is no zip, or its end is missing")
    _, size, offset, _ = END.unpack_from(tail, at)
    end = at + length - len(tail)
    at -= LOCATOR + END64.size
    if at >= 0 and tail[at + END64.size :].startswith(b"PK\6\7") and tail[at:].startswith(b"PK\6\6"):
        _, size, offset = END64.unpack_from(tail, at)
        end -= LOCATOR + END64.size
    if size > end:
        raise BadZipFile("its directory is missing")
    return end - size, end, end - size - offset


def _text(name: bytes, extras: bytes, utf8: bool) -> str:
    """A name in the letters that were meant: many programs write UTF-8 without its flag."""
    if utf8:
        return name.decode()
    field = _extra(extras, NAME)
    if len(field) > 5 and field[0] == 1 and int.from_bytes(field[1:5], "little") == zlib.crc32(name):
        return field[5:].decode()
    try:
        return name.decode()
    except UnicodeDecodeError:
        return name.decode("cp437")


def _in_64_bits(extras: bytes, *numbers: int) -> tuple[int, ...]:
    """The numbers, those that are LARGE by what the extras say."""
    if LARGE not in numbers or not (field := _extra(extras, NUMBERS)):
        return numbers
    given = iter(struct.unpack(f"<{len(field) // 8}Q", field[: len(field) // 8 * 8]))
    return tuple(min(next(given, LARGE), 2**62) if number == LARGE else number for number in numbers)


def _extra(extras: bytes, wanted: int) -> bytes:
    """The extra of a kind; nothing, if there is none."""
    at = 0
    while at + 4 <= len(extras):
        kind, length = struct.unpack_from("<HH", extras, at)
        if kind == wanted:
            return extras[at + 4 : at + 4 + length]
        at += 4 + length
    return b""
