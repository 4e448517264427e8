"""Pick some of many, evenly spread: a number of things and how many are wanted go in, the chosen indices come out."""

from __future__ import annotations

import numpy as np


def evenly(size: int, count: int) -> list[int]:
    """Return at most `count` of `size` indices, the first and the last among them."""
    return [int(index) for index in np.unique(np.linspace(0, size - 1, min(count, size)).astype(int))]


def shares(size: int, count: int) -> list[int]:
    """Return the first index of each of `count` equal shares, so that every class of a sorted set is there; all if few."""
    return list(range(size)) if count >= size else [index * size // count for index in range(count)]
