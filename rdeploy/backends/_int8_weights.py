"""What the constants of an ONNX file say of its arithmetic, found without the onnx package: INT8 weights, FP16.

Only what is asked for is read: the file is walked field by field (protobuf's wire format) and mapped, never copied whole.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from rdeploy.backends import _wire

_GRAPH, _INITIALIZER = 7, 5
_DATA_TYPE, _INT32_DATA, _RAW_DATA = 2, 5, 9
_INT8, _FLOAT16 = 3, 10
"""Field numbers of ModelProto, GraphProto and TensorProto, and TensorProto's data types, as in onnx.proto."""

_Fields = dict[int, tuple[int, int]]
_Found = TypeVar("_Found")


def largest_int8_weight(path: Path) -> int:
    """Return the largest absolute INT8 initializer; 0 where there is none, or the file is not an ONNX model."""
    return max(_of_initializers(path, _largest), default=0)


def holds_float16(path: Path) -> bool:
    """Whether an initializer is FP16; false where the file is not an ONNX model."""
    return any(_of_initializers(path, lambda content, fields: _type(content, fields) == _FLOAT16))


def _of_initializers(path: Path, read: Callable[[mmap.mmap, _Fields], _Found]) -> list[_Found]:
    """Return what `read` says of every initializer; nothing where the file is empty or damaged: its loader says so."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return [
                read(content, {field: (first, last) for field, first, last in _wire.fields(content, *span)})
                for number, start, end in _wire.fields(content, 0, len(content))
                if number == _GRAPH
                for inner, *span in _wire.fields(content, start, end)
                if inner == _INITIALIZER
            ]
    except (OSError, ValueError, IndexError):
        return []


def _type(content: mmap.mmap, fields: _Fields) -> int | None:
    return _wire.varint(content, fields[_DATA_TYPE][0])[0] if _DATA_TYPE in fields else None


def _largest(content: mmap.mmap, fields: _Fields) -> int:
    if _type(content, fields) != _INT8:
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
