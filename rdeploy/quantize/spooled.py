"""Arrays that are made image by image and read again: in memory while they are few, in a file beyond.

Not mapped: mapped pages are resident memory as well, and the peak would grow with the images.
"""

from __future__ import annotations

import math
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

IN_MEMORY_BYTES = 1 << 20


class Spooled:
    """Rows of arrays, one row an image, all of the same types and shapes; the file goes with the object."""

    def __init__(self, rows: Iterable[Sequence[NDArray[Any]]]) -> None:
        self._file = tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES)  # noqa: SIM115 - closed with the object
        weakref.finalize(self, self._file.close)
        self._kinds: list[tuple[np.dtype[Any], tuple[int, ...]]] = []
        self._count = 0
        for row in rows:
            self._kinds = [(array.dtype, array.shape) for array in row]
            self._count += 1
            for array in row:
                self._file.write(np.ascontiguousarray(array).data)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> list[NDArray[Any]]:
        size = sum(dtype.itemsize * math.prod(shape) for dtype, shape in self._kinds)
        self._file.seek(index * size)
        return [self._read(dtype, shape) for dtype, shape in self._kinds]

    def __iter__(self) -> Iterator[list[NDArray[Any]]]:
        for index in range(self._count):
            yield self[index]

    def column(self, index: int) -> NDArray[Any]:
        """Return the array at one place of every row, (rows, *its shape)."""
        sizes = [dtype.itemsize * math.prod(shape) for dtype, shape in self._kinds]
        found = []
        for row in range(self._count):
            self._file.seek(row * sum(sizes) + sum(sizes[:index]))
            found.append(self._read(*self._kinds[index]))
        return np.stack(found)

    def _read(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        return np.frombuffer(self._file.read(dtype.itemsize * math.prod(shape)), dtype).reshape(shape)
