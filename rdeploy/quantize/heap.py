"""Give memory that is free back to the system: nothing goes in, nothing comes out.

glibc keeps what was freed for itself, in pieces between what is still used: after a network's activations were looked at, as
much as they took. A later step's own then comes on top of it.
"""

from __future__ import annotations

import ctypes
import functools
import gc
from collections.abc import Callable

LARGE_BYTES = 4 << 20
"""Graphs of this size and more are worth looking for: they refer to themselves, and wait for the collector."""


def release(size: int) -> None:
    """Give free memory back, and what graphs left behind where the ones at hand take `size` bytes."""
    if size > LARGE_BYTES:
        gc.collect()  # ten copies of a ViT-B were waiting for it, 4 GB
    _trim()(0)


@functools.cache
def _trim() -> Callable[[int], object]:
    """Return glibc's malloc_trim; something that does nothing where there is another C library."""
    try:
        found: Callable[[int], object] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return lambda pad: None
    return found
