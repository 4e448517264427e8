"""Protobuf's wire format, as much of it as reading an ONNX file without the onnx package takes: nothing is copied."""

from __future__ import annotations

import mmap
from collections.abc import Iterator

_FIXED_BYTES = {1: 8, 5: 4}


def fields(content: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield (field number, start, end) of the values of the message between `start` and `end`.

    Raises:
        ValueError: it is no message.
        IndexError: it ends in the middle of a number.
    """
    while start < end:
        key, start = varint(content, start)
        number, wire = key >> 3, key & 7
        if wire == 2:
            length, start = varint(content, start)
            stop = start + length
        elif wire in _FIXED_BYTES:
            stop = start + _FIXED_BYTES[wire]
        elif wire == 0:
            _, stop = varint(content, start)
        else:
            raise ValueError("not a protobuf message")
        if stop > end:
            raise ValueError("a field ends behind its message")
        yield number, start, stop
        start = stop


def varint(content: mmap.mmap, start: int) -> tuple[int, int]:
    """Return the number that begins at `start`, and where it ends.

    Raises:
        ValueError: it has more than 64 bits.
    """
    value = shift = 0
    while shift < 64:
        byte = content[start]
        start += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, start
    raise ValueError("not a protobuf message")
