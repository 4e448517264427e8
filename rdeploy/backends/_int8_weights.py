"""The largest INT8 weight of an ONNX file, found without the onnx package: a path goes in, 0 to 128 comes out.

Only what is asked for is read: the file is walked field by field (protobuf's wire format) and mapped, never copied whole.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np

from rdeploy.backends import _wire

_GRAPH, _INITIALIZER = 7, 5
_DATA_TYPE, _INT32_DATA, _RAW_DATA = 2, 5, 9
_INT8 = 3
"""Field numbers of ModelProto, GraphProto and TensorProto, and TensorProto's INT8, as in onnx.proto."""


def largest_int8_weight(path: Path) -> int:
    """Return the largest absolute INT8 initializer; 0 where there is none, or the file is not an ONNX model."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _largest(content)
    except (OSError, ValueError, IndexError):  # empty or damaged: whoever loads it says what is wrong
        return 0


def _largest(content: mmap.mmap) -> int:
    largest = 0
    for number, start, end in _wire.fields(content, 0, len(content)):
        if number != _GRAPH:
            continue
        for inner, first, last in _wire.fields(content, start, end):
            if inner == _INITIALIZER:
                largest = max(largest, _of_tensor(content, first, last))
    return largest


def _of_tensor(content: mmap.mmap, start: int, end: int) -> int:
    fields = {number: (first, last) for number, first, last in _wire.fields(content, start, end)}
    kind = fields.get(_DATA_TYPE)
    if kind is None or _wire.varint(content, kind[0])[0] != _INT8:
        return 0
    if _RAW_DATA in fields:
        first, last = fields[_RAW_DATA]
        values = np.frombuffer(content[first:last], np.int8)
        return int(np.abs(values.astype(np.int16)).max(initial=0))
    return _largest_varint(content, *fields[_INT32_DATA]) if _INT32_DATA in fields else 0


def _largest_varint(content: mmap.mmap, start: int, end: int) -> int:
    """Return the largest absolute value of packed 32-bit integers; negative ones are written as 64-bit complements."""
    largest = 0
    while start < end:
        value, start = _wire.varint(content, start)
        largest = max(largest, abs(value - (1 << 64) if value >> 63 else value))
    return largest
